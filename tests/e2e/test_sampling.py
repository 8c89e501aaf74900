"""The example from prompts to a fused model, where vLLM is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sampling" / "run.py"


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_prompts_to_a_fused_model(tmp_path: Path) -> None:
    python = os.environ.get("MEGAFUSE_VLLM_PYTHON", "")
    if not python:
        why = "set MEGAFUSE_VLLM_PYTHON to a Python with vLLM: scripts/vllm_env.sh makes an environment for it"
        pytest.skip(os.environ.get("MEGAFUSE_NO_VLLM", why))
    command = [sys.executable, str(EXAMPLE), "--vllm-python", python, "--run", str(tmp_path / "run")]
    if model := os.environ.get("MEGAFUSE_SMOLLM2"):
        command += ["--model", model]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len((tmp_path / "run" / "fusesft" / "metrics.jsonl").read_text().splitlines()) == 4
    assert done.stdout.strip().splitlines()[-1].startswith("FuseSFT on ")


def test_without_vllm_the_example_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--vllm-python", str(python), "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        done.returncode == 77 and done.stdout == f"skipped: {python} has no vllm\n" and not (tmp_path / "run").exists()
    )
