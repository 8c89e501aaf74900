"""The scripts for GPU machines, as far as a machine without a GPU and without network can run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a CUDA device")


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable} | env,
        capture_output=True,
        text=True,
        timeout=550,
    )


def words(script: str, name: str) -> list[str]:
    """The array `name` of a shell script."""
    found = re.search(rf"^{name}=\(([^)]*)\)", (ROOT / "scripts" / script).read_text(), re.MULTILINE)
    assert found is not None
    return found[1].split()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("gpu_*.sh")), ids=lambda path: path.stem)
def test_scripts_are_bash(script: Path) -> None:
    found = run("bash", "-n", str(script))
    assert found.returncode == 0, found.stderr


def test_the_kernel_tests_that_use_a_gpu_are_run_on_one() -> None:
    listed = {ROOT / name for name in words("gpu_env.sh", "GPU_KERNEL_TESTS")}
    on_a_device = {
        path for path in (ROOT / "tests/kernels").glob("test_*.py") if "device: torch.device" in path.read_text()
    }
    assert listed == on_a_device


def test_every_wheel_has_a_version() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    needed = words("gpu_wheels.sh", "needed")
    assert len(needed) == 11 and set(needed) <= set(pinned)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", peer) for peer in words("gpu_wheels.sh", "peers"))


def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for arguments in ([], ["nothing"], ["setup"], ["kernels", "train"]):
        found = run("bash", "scripts/gpu_run.sh", *arguments, OUT=str(tmp_path / "out"))
        assert found.returncode == 2 and "gpu_run.sh correct" in found.stderr and found.stdout == ""
    assert not (tmp_path / "out").exists()
    found = run("bash", "scripts/gpu_wheels.sh", DATA=str(tmp_path / "none.jsonl"))
    assert found.returncode == 2 and "is not there" in found.stderr


@NO_GPU
def test_a_measurement_without_a_device_says_so_piece_by_piece(tmp_path: Path) -> None:
    """`kernels`, whose pieces ask for the device first. OUT gets a log of each and the summary."""
    found = run("bash", "scripts/gpu_run.sh", "kernels", OUT=str(tmp_path))
    said = found.stdout + found.stderr
    assert found.returncode == 2, said
    assert re.findall(r"^== (\w+): rc (\d+) after", said, re.MULTILINE) == [("llama", "2"), ("gemma", "2")]
    assert said.count("measures a CUDA device, and there is none here") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"summary.txt", "llama.log", "gemma.log"}


@NO_GPU
def test_trl_is_not_measured_on_a_cpu_by_accident() -> None:
    found = run(sys.executable, "bench/peers/trl_dpo.py", "--data", "none.jsonl", PYTHONPATH=str(ROOT))
    assert found.returncode == 2 and "there is none here" in found.stderr
