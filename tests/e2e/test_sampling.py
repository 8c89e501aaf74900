"""The example from prompts to a fused model, where vLLM is at hand."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sampling" / "run.py"


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_prompts_to_a_fused_model(tmp_path: Path) -> None:
    python = os.environ.get("MEGAFUSE_VLLM_PYTHON", "")
    if not python:
        why = "set MEGAFUSE_VLLM_PYTHON to a Python with vLLM: scripts/vllm_env.sh makes an environment for it"
        pytest.skip(os.environ.get("MEGAFUSE_NO_VLLM", why))
    command = [sys.executable, str(EXAMPLE), "--vllm-python", python, "--run", str(tmp_path / "run")]
    if model := os.environ.get("MEGAFUSE_SMOLLM2"):
        command += ["--model", model]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait()
        finally:  # after a timeout too: a vLLM must not stay
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    if status == 77:
        pytest.skip(text.strip())
    assert status == 0, text[-4000:]
    assert len((tmp_path / "run" / "fusesft" / "metrics.jsonl").read_text().splitlines()) == 4
    assert "FuseSFT on " in text and (tmp_path / "run" / "report.html").stat().st_size > 10_000
    scored = [json.loads(line) for line in (tmp_path / "run" / "scored.jsonl").read_text().splitlines()]
    assert len(scored) == 48 and {len(row["responses"]) for row in scored} == {9}
    assert len({r["source"] for r in scored[0]["responses"]}) == 3


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
