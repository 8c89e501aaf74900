"""Asked to stop, a run saves within a step, says so by its exit code, and is the same run when it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megafuse.checkpoint.folder import complete_steps
from megafuse.config.load import dump_toml
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.observe.manifest import read_json
from megafuse.observe.metrics import read_metrics
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stop")
    import_hf(write_tiny_llama(root / "hf", seed=3, layers=1), root / "model")
    write_tiny_dataset(root / "sft", "sft", seed=4)
    return root


def config(inputs: Path, run: Path, **changes: Any) -> TrainConfig:
    settings = {"checkpoint": {"keep": 9}, "global_batch_size": 4, "epochs": 9}
    return tiny_run(run, inputs / "model", inputs / "sft", **{**settings, **changes})


def start(config: TrainConfig) -> subprocess.Popen[str]:
    path = config.run_dir.with_suffix(".toml")
    path.write_text(dump_toml(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "megafuse", "train", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def losses(run: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(inputs: Path, tmp_path: Path, number: int, code: int) -> None:
    stopped = config(inputs, tmp_path / "stopped")
    process = start(stopped)
    metrics = stopped.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    seen = metrics.read_bytes().count(b"\n")
    process.send_signal(number)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == code, error
    (saved,) = complete_steps(stopped.run_dir / "checkpoints")
    assert len(read_metrics(stopped.run_dir)) == saved and seen <= saved <= 53
    assert f"after step {saved}, saved as" in error
    assert read_json(stopped.run_dir / "outcome.json")["code"] == code
    assert not (stopped.run_dir / "lock").exists()
    if number != signal.SIGUSR1:
        return
    from megafuse.training.run import train

    train(stopped)
    whole = config(inputs, tmp_path / "whole")
    train(whole)
    assert losses(stopped.run_dir) == losses(whole.run_dir) and len(losses(whole.run_dir)) == 54
    assert not (stopped.run_dir / "outcome.json").exists()
