"""The scripts for GPU machines, as far as a machine without a GPU and without network can run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a CUDA device")


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
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
    assert len(needed) == 14 and set(needed) <= set(pinned)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", peer) for peer in words("gpu_wheels.sh", "peers"))


def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for arguments in ([], ["nothing"], ["setup"], ["kernels", "train"]):
        found = run("bash", "scripts/gpu_run.sh", *arguments, OUT=str(tmp_path / "out"))
        assert found.returncode == 2 and "gpu_run.sh correct" in found.stderr and found.stdout == ""
    assert not (tmp_path / "out").exists()
    (tmp_path / "scored.json").touch()  # gpu_run.sh would not find it
    for name in ("scored.json", "none.jsonl"):
        found = run("bash", "scripts/gpu_wheels.sh", DATA=str(tmp_path / name))
        assert found.returncode == 2 and ".jsonl.gz" in found.stderr and found.stdout == ""
    found = run("bash", "scripts/gpu_bench.sh", DATA="")
    assert found.returncode == 2 and "set DATA" in found.stderr
    found = run("bash", "scripts/gpu_wheels.sh", DATA=str(tmp_path / "none.jsonl"))
    assert found.returncode == 2 and "is not there" in found.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts alone: no wheels, data or builds that a checkout may have."""
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout" / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path / "checkout")
    return tmp_path / "checkout"


@NO_GPU
@pytest.mark.parametrize("command", ["gpu_run.sh correct", "gpu_bench.sh", "gpu_check.sh"])
def test_without_a_device_nothing_is_begun(command: str, checkout: Path, tmp_path: Path) -> None:
    script, *arguments = command.split()
    found = run(
        "bash", f"scripts/{script}", *arguments, cwd=checkout, OUT=str(tmp_path / "out"), DATA="data", WHEELS="wheels"
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr == f"{command} needs a CUDA device, and torch finds none here\n" and found.stdout == ""
    assert {p.name for p in tmp_path.iterdir()} == {"checkout"}
    assert {p.name for p in checkout.iterdir()} == {"scripts", "constraints.txt"}


@NO_GPU
def test_without_a_device_a_measurement_is_a_rehearsal(tmp_path: Path) -> None:
    """Everything is installed from the wheels that are there, and every piece says that there is nothing to measure."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("wheels", ".gpu", "build", "runs", ".venv*", ".git", "*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    found = run("bash", "scripts/gpu_run.sh", "kernels", cwd=copy, OUT=str(tmp_path / "out"))
    assert found.returncode == 2, found.stdout + found.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.findall(r"^== (\w+): rc (\d+) after", summary, re.MULTILINE) == [
        ("timed", "2"), ("llama", "2"), ("gemma", "2"),
    ]  # fmt: skip
    assert found.stdout.count("measures a CUDA device, and there is none here") == 3


# A machine with a device, as far as the scripts see it: what is asked is answered, what is started is written down,
# and the files that it was to write are there. `pip download` leaves a wheel of each package.
PYTHON = """#!/usr/bin/env bash
case $* in
  "-c "*cache_tag*) echo cpython-312; exit ;;
  "-c "*EXT_SUFFIX*) echo .so; exit ;;
  "-c "*is_available*) exit "${DEVICE_STATUS:-0}" ;;
  - | "- "*) cat > /dev/null; exit ;;
  -V | -VV) echo Python 3.12; exit ;;
esac
echo "$*" >> "$STARTED"
while [ $# -gt 0 ]; do
  case $1 in
    --out) mkdir -p "$(dirname "$2")"; [ -d "$2" ] || touch "$2" ;;
    --observe.trace) mkdir -p "$2"; touch "$2/k4_shared.json.gz" ;;
    --dest) for name in "${@:3}"; do name=${name%%==*}; touch "$2/${name//-/_}-1-py3-none-any.whl"; done ;;
  esac
  shift
done
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$2 $3" >> "$LIMITS"
exec "${@:4}"
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of such a machine. `STARTED` and `LIMITS` are files: commands, and their seconds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PYTHON": str(folder / "python"),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STARTED": str(tmp_path / "started"),
        "LIMITS": str(tmp_path / "limits"),
        "OUT": str(tmp_path / "out"),
    }


SETUP = 30  # seconds of the wheels and the packer's build, where nothing is installed yet: some 15 were seen


@pytest.mark.parametrize(
    ("command", "pieces"),
    [
        ("correct", ["gpu", "gpu_check", "kernels"]),
        ("kernels", ["gemma", "llama", "timed"]),
        ("train", ["megafuse_1b", "trl_1b"]),
        ("trace", ["flex", "sdpa", "traced"]),
    ],
)
def test_the_limits_of_a_command_add_up_to_ten_minutes(
    command: str, pieces: list[str], checkout: Path, machine: dict[str, str]
) -> None:
    (checkout / ".gpu").mkdir()
    (checkout / ".gpu" / "lengths.jsonl.gz").touch()
    found = run("bash", "scripts/gpu_run.sh", command, cwd=checkout, **machine)
    assert found.returncode == 0, found.stdout + found.stderr
    files = {str(p.relative_to(machine["OUT"])) for p in Path(machine["OUT"]).rglob("*") if p.is_file()}
    assert files >= {"summary.txt", *(f"{name}.log" for name in pieces)} and len(files) <= 8, files
    verdicts = re.findall(r"^== (\w+): rc 0 after", (Path(machine["OUT"]) / "summary.txt").read_text(), re.MULTILINE)
    assert sorted(verdicts) == pieces and "more than" not in found.stdout
    doctor, *limits = [sum(map(int, line.split())) for line in Path(machine["LIMITS"]).read_text().splitlines()]
    assert len(limits) == len(pieces)
    assert SETUP + doctor + (max(limits) if command == "correct" else sum(limits)) <= 560
    started = Path(machine["STARTED"]).read_text()
    timed = [line for line in started.splitlines() if "-m timed" in line]
    assert ("-m not timed" in started) == (command == "correct") and len(timed) == (command == "kernels")
    if command in ("train", "trace"):
        assert "--data.path .gpu/lengths.jsonl.gz" in started
        (checkout / ".gpu" / "more.jsonl").touch()
        found = run("bash", "scripts/gpu_run.sh", command, cwd=checkout, **machine)
        assert found.returncode == 2 and "keep one of them, or set DATA" in found.stdout
        assert run("bash", "scripts/gpu_run.sh", command, cwd=checkout, DATA="scripts", **machine).returncode == 0


def test_what_is_asked_of_torch_and_cannot_be_answered_is_no_missing_device(
    checkout: Path, machine: dict[str, str]
) -> None:
    """A Python without torch, which ends with 1."""
    found = run("bash", "scripts/gpu_run.sh", "train", cwd=checkout, DEVICE_STATUS="1", **machine)
    assert found.returncode == 1 and "needs a CUDA device" not in found.stderr


def test_results_go_where_they_are_wanted(checkout: Path, machine: dict[str, str]) -> None:
    started, out = Path(machine["STARTED"]), machine["OUT"]
    for given, report in (
        ({"OUT": "", "REPORT": ""}, "bench/results/gpu_check.json"),
        ({"REPORT": ""}, f"{out}/gpu_check.json"),
        ({"REPORT": f"{out}/mine.json"}, f"{out}/mine.json"),
    ):
        started.unlink(missing_ok=True)
        found = run("bash", "scripts/gpu_check.sh", cwd=checkout, **machine | given)
        assert found.returncode == 0, found.stderr
        assert f"megafuse.testing.gpu_check --out {report}\n" in started.read_text()
    for given, folder in (({"OUT": ""}, "bench/results"), ({}, out)):
        started.unlink()
        found = run("bash", "scripts/gpu_bench.sh", cwd=checkout, DATA="lengths.jsonl", **machine | given)
        assert found.returncode == 0, found.stderr
        assert f"--out {folder}/bench_llama1b.json\n" in started.read_text()
        assert f"bench/kernels.py --out {folder}\n" in started.read_text()


def test_lengths_that_are_taken_along_replace_those_of_before(checkout: Path, machine: dict[str, str]) -> None:
    (checkout / ".gpu").mkdir()
    for name in ("old.jsonl", "older.jsonl.gz"):
        (checkout / ".gpu" / name).touch()
    for data in ("new.jsonl.gz", ".gpu/new.jsonl.gz"):  # the second is there already
        (checkout / "new.jsonl.gz").write_text("lengths")
        found = run("bash", "scripts/gpu_wheels.sh", cwd=checkout, DATA=data, **machine)
        assert found.returncode == 0, found.stderr
        assert [p.name for p in (checkout / ".gpu").glob("*.jsonl*")] == ["new.jsonl.gz"]
        assert (checkout / ".gpu" / "new.jsonl.gz").read_text() == "lengths"
    assert len(list((checkout / "wheels").glob("*.whl"))) == 14
    assert run("bash", "scripts/gpu_wheels.sh", cwd=checkout, **machine).returncode == 0
    assert (checkout / ".gpu" / "new.jsonl.gz").is_file()


@pytest.mark.parametrize(
    ("given", "old"),
    [
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "unset"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({}, "expandable_segments:True"),
    ],
)
def test_the_users_allocator_settings_stay(given: dict[str, str], old: str, machine: dict[str, str]) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    clean = {name: given.get(name, "") for name in names}
    unset = "".join(f"unset {name}; " for name in names if name not in given)
    show = 'echo "${PYTORCH_ALLOC_CONF-unset} ${PYTORCH_CUDA_ALLOC_CONF-unset}"'
    found = run("bash", "-euc", f"{unset} source scripts/gpu_env.sh; {show}", **machine | clean)
    assert found.stdout.split() == [given.get("PYTORCH_ALLOC_CONF", "unset"), old]


@NO_GPU
def test_trl_is_not_measured_on_a_cpu_by_accident() -> None:
    found = run(sys.executable, "bench/peers/trl_dpo.py", "--data", "none.jsonl", PYTHONPATH=str(ROOT))
    assert found.returncode == 2 and "there is none here" in found.stderr
