"""scripts/vllm_env.sh where there is no vLLM to be had: a reason for the tests to show, never a failure."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "vllm_env.sh"
# what the script asks of a Python, answered by a shell script
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") case "$*" in *download*) {download} ;; *) exit 1 ;; esac ;;
    *) exit {version} ;;
esac
"""


@pytest.mark.parametrize(
    ("version", "download", "why"),
    [
        (1, "exit 0", "wants Python 3.11"),
        (0, "exit 1", "cannot be had from the package index"),
        (0, "sleep 60", "cannot be had from the package index"),
        (0, "exit 0", "cannot be installed within 2 s"),
    ],
)
def test_no_vllm_is_a_reason(tmp_path: Path, version: int, download: str, why: str) -> None:
    for name in ("python", "python3.11"):
        (tmp_path / name).write_text(PYTHON.format(version=version, download=download))
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "a folder"), "2"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    word, setting = shlex.split(done.stdout)
    assert word == "export" and setting.startswith("MEGAFUSE_NO_VLLM=") and why in setting
