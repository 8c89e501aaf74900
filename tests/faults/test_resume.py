"""A run that is killed and started again is the same run, to the bit; a bad step updates nothing on any rank."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megafuse.checkpoint.folder import complete_steps, read_manifest, step_name
from megafuse.config.drift import bind, find_drift
from megafuse.config.load import dump_toml
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama

pytestmark = pytest.mark.faults

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    import_hf(write_tiny_llama(root / "hf", seed=3), root / "model")
    write_tiny_dataset(root / "pair", "pair", seed=4)
    return root


def config(inputs: Path, run: Path, **changes: Any) -> TrainConfig:
    settings = {
        "model": {"precision": changes.pop("precision", "bf16")},
        "loss": {"name": "dpo", "beta": 0.3},
        "optim": {"distributed": changes.pop("distributed", True)},
        "checkpoint": {"interval": 2, "keep": 9},
        "epochs": 2,
        "max_steps": STEPS,
    }
    return tiny_run(run, inputs / "model", inputs / "pair", **{**settings, **changes})


def numbers(run: Path) -> list[tuple[str, ...]]:
    """What must be bit-equal: everything but the clock."""
    clock = ("step_seconds", "tokens_per_second", "mfu")
    return [tuple(f"{k}={v!r}" for k, v in record.items() if k not in clock) for record in read_metrics(run)]


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_distributed_bf16": {},
    "dp2_plain_fp32": {"distributed": False, "precision": "fp32"},
    "tp2_bf16": {"parallel": {"tensor": 2, "sequence": True}, "distributed": False},
    "pp2_fp32": {"parallel": {"pipeline": 2}, "precision": "fp32"},
}


def test_every_checkpoint_leads_to_the_same_run(inputs: Path, tmp_path: Path) -> None:
    whole = {name: config(inputs, tmp_path / name, **changes) for name, changes in LAYOUTS.items()}
    run_distributed(run_trainings, 2, list(whole.values()))
    again = {}
    for name, base in whole.items():
        assert complete_steps(base.run_dir / "checkpoints") == [2, 4, 6]
        for step in (2, 4):
            copy = tmp_path / f"{name}-from-{step}"
            shutil.copytree(base.run_dir, copy)
            for later in range(step + 2, STEPS + 1, 2):
                shutil.rmtree(copy / "checkpoints" / step_name(later))
            again[name, step] = base.model_copy(update={"run_dir": copy})
    run_distributed(run_trainings, 2, list(again.values()))
    for (name, step), resumed in again.items():
        assert numbers(resumed.run_dir) == numbers(whole[name].run_dir), (name, step)
        assert read_manifest(resumed.run_dir / "checkpoints" / step_name(STEPS))["step"] == STEPS


def start(path: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.getcwd()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen([*launcher, "-m", "megafuse", "train", str(path)], env=environment)


def test_kill_9_during_training_then_started_again_is_the_same_run(inputs: Path, tmp_path: Path) -> None:
    whole = config(inputs, tmp_path / "whole", checkpoint={"interval": 0})
    killed = config(inputs, tmp_path / "killed")
    run_distributed(run_trainings, 2, [whole])
    path = tmp_path / "killed.toml"
    path.write_text(dump_toml(killed))
    process = start(path)
    metrics = killed.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3):  # between the saves of steps 2 and 4
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.wait()
    assert start(path).wait(240) == 0
    assert numbers(killed.run_dir) == numbers(whole.run_dir)
    assert start(path).wait(240) == 0  # a finished run: nothing more happens
    assert numbers(killed.run_dir) == numbers(whole.run_dir)


def test_a_run_folder_refuses_another_configuration(inputs: Path, tmp_path: Path) -> None:
    first = config(inputs, tmp_path / "run", max_steps=2, precision="fp32")
    run_distributed(run_trainings, 1, [first])
    other = config(inputs, tmp_path / "run", max_steps=2, precision="fp32", seed=9)
    with pytest.raises(ConfigError, match=r"seed: began with 0, now 9"):
        find_drift(other)
    assert find_drift(first.model_copy(update={"on_nonfinite": "skip"})) == {}
    with pytest.raises(ConfigError, match=r"'sed' is no field; did you mean 'seed'"):
        find_drift(other.model_copy(update={"allow_change": ("sed",)}))
    loss = first.loss.model_copy(update={"beta": 0.1})
    longer = first.model_copy(update={"allow_change": ("loss.beta", "max_steps"), "max_steps": 3, "loss": loss})
    run_distributed(run_trainings, 1, [longer])
    (beta, steps) = read_manifest(first.run_dir / "checkpoints" / step_name(3))["changes"]
    assert (beta["field"], beta["began"], beta["now"], beta["after_step"]) == ("loss.beta", 0.3, 0.1, 2)
    assert (steps["field"], steps["began"], steps["now"]) == ("max_steps", 2, 3)
    usual = longer.model_copy(update={"allow_change": ()})  # from here on
    assert find_drift(usual) == {} and bind(usual, {}, 3) == [beta, steps]
    with pytest.raises(ConfigError, match=r"loss.beta: began with 0.1, now 0.3"):
        find_drift(first)


def test_a_damaged_checkpoint_is_named(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "model", tmp_path / "model")
    victim = next((tmp_path / "model").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=victim.name):
        read_manifest(tmp_path / "model")
