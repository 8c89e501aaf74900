"""Where a real Slurm cannot run the tests say why, and CI installs one where it may."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megafuse.testing import slurm_cluster
from megafuse.testing.slurm_cluster import NoSlurm, SlurmCluster

ROOT = Path(__file__).resolve().parents[2]


def test_without_slurm_the_reason_is_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm_cluster.shutil, "which", lambda name: None if name.startswith("slurm") else name)
    with pytest.raises(NoSlurm, match=r"^slurmctld, slurmd not found: apt-get install slurmctld slurmd "):
        SlurmCluster(tmp_path / "lab").start()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoSlurm, match="not root"):
        SlurmCluster(tmp_path / "lab").start()
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize(
    ("there", "root", "works", "calls", "told"),
    [
        (True, True, True, [], ""),
        (False, True, True, ["apt-get install"], ""),
        (False, True, False, ["apt-get install", "apt-get update"], "Slurm and bubblewrap could not be installed"),
        (False, False, True, [], ""),
    ],
    ids=["installed", "installs", "cannot", "not-root"],
)
def test_ci_installs_slurm_where_it_may(
    tmp_path: Path, there: bool, root: bool, works: bool, calls: list[str], told: str
) -> None:
    """.ci/run with stand-ins for make, apt-get and id; whatever happens to Slurm, the tests are run."""
    bin_, repository = tmp_path / "bin", tmp_path / "repository"
    bin_.mkdir()
    (repository / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", repository / ".ci" / "run")
    log = 'echo "$(basename "$0") $1" >> "$LOG"'
    bodies = {"make": log, "apt-get": f"{log}\nexit {0 if works else 100}", "id": f"echo {0 if root else 1000}"}
    for name, body in {**bodies, **({"slurmctld": "", "bwrap": ""} if there else {})}.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    for name in ("dirname", "basename", "sh"):
        (bin_ / name).symlink_to(str(shutil.which(name)))
    env = {"PATH": str(bin_), "LOG": str(tmp_path / "log")}
    line = [str(shutil.which("bash")), str(repository / ".ci" / "run")]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().splitlines() == [*calls, "make venv", "make lint", "make test"]
    assert done.stdout.strip() == told
