"""megafuse doctor: what it says of good, absent, broken and mistaken packages."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megafuse.cli.main import main
from megafuse.doctor import hardware, software
from megafuse.doctor.finding import Finding, guarded, try_import
from megafuse.parallel.precision import bf16_of

ROOT = Path(__file__).resolve().parents[2]


def package(folder: Path, name: str, files: dict[str, str]) -> Path:
    for file, text in files.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def doctor_json(*shadow: Path) -> tuple[int, dict[str, dict[str, object]]]:
    path = os.pathsep.join(map(str, [*shadow, ROOT]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megafuse", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    report = json.loads(done.stdout)
    assert report["usable"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in report["findings"]}


def test_here_the_core_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("Python", "torch", "megatron-core", "gloo", "Slurm", "vLLM", "NeMo-Run", "math-verify", "CPU"):
        assert name in text
    assert "megafuse can run here." in text


def test_a_broken_torch_is_reported_not_raised(tmp_path: Path) -> None:
    package(tmp_path, "torch", {"__init__.py": "raise ImportError('libcudart.so.99: cannot open shared object file')"})
    status, findings = doctor_json(tmp_path)
    assert status == 1
    assert findings["torch"]["status"] == "problem" and "libcudart.so.99" in str(findings["torch"]["detail"])
    assert findings["machine"]["status"] == "ok"


def test_a_probe_that_exits_is_a_finding() -> None:
    def leave() -> Finding:
        raise SystemExit("gone")

    found = guarded("x", leave, core=True)
    assert (found.status, found.detail, found.core) == ("problem", "SystemExit: gone", True)


def test_try_import_survives_a_crash_and_a_hang() -> None:
    assert try_import("import json") == ""
    assert try_import("import no_such_thing") == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert "status -6" in try_import("import os; os.abort()")
    assert "took more than" in try_import("import time; time.sleep(60)", seconds=0.5)


def test_the_other_apex_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = package(tmp_path / "other", "apex", {"__init__.py": "", "lib/libapex.py": ""})
    nvidia = package(tmp_path / "nvidia", "apex", {"__init__.py": "", "optimizers/fused_adam.py": ""})
    assert software.apex().status == "absent"
    for folder, words in ((other, "another project of the same name"), (nvidia, "amp_C")):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            patch.setenv("PYTHONPATH", str(folder))
            importlib.invalidate_caches()
            found = software.apex()
        assert found.status == "problem" and words in found.detail and "pip uninstall apex" in found.fix
        assert "apex" not in sys.modules


def test_a_folder_that_poses_as_hugging_face_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if software.version("kernels"):
        pytest.skip("Hugging Face kernels is installed here")
    package(tmp_path, "kernels", {"__init__.py": ""})
    monkeypatch.delitem(sys.modules, "kernels", raising=False)  # transformers may have imported the bare folder
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert software.hf_kernels().status == "problem"
    (tmp_path / "kernels" / "__init__.py").unlink()
    importlib.invalidate_caches()
    assert software.hf_kernels().status == "ok"


def test_without_the_packer_megafuse_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megafuse.kernels._C", None)
    found = software.extension()
    assert found.status == "problem" and found.core and "C++17 compiler" in found.fix


def test_a_version_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(software.REQUIRED, "megatron-core", ">=99")
    monkeypatch.setitem(software.REQUIRED, "no-such-distribution", "")
    found = software.requirements()
    assert found.status == "problem" and found.core
    assert "is outside >=99" in found.detail and "no-such-distribution is not installed" in found.detail


def test_ranges_are_those_of_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    plain = {d.partition(";")[0].strip() for d in declared if "platform" not in d and "python_version" not in d}
    assert {name + wanted for name, wanted in software.REQUIRED.items()} == plain


def test_transformer_engine_that_is_there_but_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "transformer_engine", {"__init__.py": "", "pytorch.py": "raise OSError('libcuda.so.1')"})
    info = tmp_path / "transformer_engine-2.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    importlib.invalidate_caches()
    found = software.transformer_engine()
    assert found.status == "problem" and "2.9: OSError: libcuda.so.1" in found.detail


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo 'sinfo: error: one'; echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1",
         "problem", "sinfo fails: slurm_load_partitions: Unable to contact slurm controller"),
        ("exit 3", "problem", "sinfo fails: status 3"),
        ("echo 'gpu* 4'; echo 'cpu 12'", "ok", "nodes by partition: 4 x gpu*, 12 x cpu"),
    ],
)  # fmt: skip
def test_a_slurm_that_does_not_answer_is_unusable_in_one_line(
    script: str, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = software.slurm()
    assert (found.status, found.detail) == (status, words)
    assert ("--on local" in found.fix) == (status == "problem")


def test_the_cpu_line_says_what_auto_does_here() -> None:
    found = hardware.cpu_precision()
    native = bf16_of(torch.device("cpu")).native
    assert f"auto trains in {'bf16' if native else 'fp32'}" in found.detail and "GFLOP/s" in found.detail
    assert bool(found.fix) != native


def test_what_can_be_installed_is_named_as_a_checkout_installs_it() -> None:
    """Nothing tells anyone to install `megafuse[...]` by name: no package index has it."""
    extras = tomllib_extras()
    for label, extra in software.EXTRAS.items():
        name = extra[-1].partition(".[")[2].partition("]")[0]
        assert name in extras, label
    for path in [*(ROOT / "megafuse").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        assert "pip install 'megafuse[" not in path.read_text(), path


def tomllib_extras() -> set[str]:
    tomllib = pytest.importorskip("tomllib")
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_memory_and_cores_are_the_least_that_a_control_group_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "groups" / "user" / "job"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/user/job\n")
    monkeypatch.setattr(hardware, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    whole = hardware.memory_bytes()
    (job / "memory.max").write_text("max\n")
    (job / "cpu.max").write_text("max 100000\n")
    assert (hardware.memory_bytes(), hardware.usable_cores()) == (whole, 64)
    (job.parent / "memory.max").write_text(f"{6 * 2**20}\n")
    (job.parent / "cpu.max").write_text("150000 50000\n")
    assert (hardware.memory_bytes(), hardware.usable_cores()) == (6 * 2**20, 3)
    (job / "cpu.max").write_text("20000 100000\n")
    assert hardware.usable_cores() == 1
    # version 1; in a container the path is the host's, and the root's folder is the container's
    (tmp_path / "own").write_text("12:memory:/old\n4:cpu,cpuacct:/not/here\n1:name=systemd:/\n")
    assert (hardware.memory_bytes(), hardware.usable_cores()) == (whole, 64)
    (tmp_path / "groups" / "memory" / "old").mkdir(parents=True)
    (tmp_path / "groups" / "memory" / "old" / "memory.limit_in_bytes").write_text(f"{5 * 2**20}\n")
    (tmp_path / "groups" / "cpu").mkdir()
    (tmp_path / "groups" / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert (hardware.memory_bytes(), hardware.usable_cores()) == (5 * 2**20, 64)
    (tmp_path / "groups" / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "groups" / "cpu" / "cpu.cfs_period_us").write_text("200000\n")
    assert hardware.usable_cores() == 2
