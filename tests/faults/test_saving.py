"""Checkpoints that cannot be written, by this process or by one in the background, and kills in the middle of both."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megafuse.checkpoint import writer
from megafuse.checkpoint.folder import complete_steps, step_name
from megafuse.checkpoint.saver import Saver
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.errors import PreemptedError, StorageError
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed
from megafuse.testing.save_faults import break_saves_alone, break_saves_in_turn
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training.run import train

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saving")
    import_hf(write_tiny_llama(root / "hf", seed=3, layers=1), root / "model")
    write_tiny_dataset(root / "pair", "pair", seed=4)
    return root


def config(inputs: Path, run: Path, **checkpoint: Any) -> TrainConfig:
    loss = {"name": "simpo", "beta": 2.0, "gamma": 0.5}
    saving = {"interval": 2, "keep": 9, **checkpoint}
    return tiny_run(run, inputs / "model", inputs / "pair", loss=loss, checkpoint=saving, epochs=2, max_steps=6)


def numbers(run: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run)]


def saved(run: Path) -> list[int]:
    assert not list((run / "checkpoints").glob("*.tmp"))
    return complete_steps(run / "checkpoints")


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "sync": ({}, (), "raise"),
    "async": ({"async_save": True}, (), "raise"),
    "stop": ({}, (2,), "limit"),
    "continue": ({"on_save_error": "continue"}, (2,), "limit"),
    "too often": ({"on_save_error": "continue", "max_save_errors": 1, "max_unsaved_steps": 99}, (1, 2), "raise"),
    "last": ({"on_save_error": "continue"}, (3,), "raise"),
    "writer raises": ({"async_save": True}, (2,), "limit"),
    "writer dies": ({"async_save": True}, (2,), "exit"),
    "writer fails twice": ({"async_save": True}, (2, 3), "raise"),
    "unsaved": ({"async_save": True, "on_save_error": "continue", "max_unsaved_steps": 3}, (2, 3), "raise"),
}


def metadata(folder: Path) -> tuple[Any, Any]:
    """Without what names the save: a random id and the path."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    return found.state_dict_metadata, found.storage_data


def test_saves_that_fail_on_one_rank(inputs: Path, tmp_path: Path) -> None:
    configs = {name: config(inputs, tmp_path / name, **changes) for name, (changes, _, _) in CASES.items()}
    cases = [(configs[name], 1, saves, how) for name, (_, saves, how) in CASES.items()]
    first, second = run_distributed(break_saves_in_turn, 2, cases)
    errors = {name: seen["error"] for name, seen in zip(CASES, first)}
    assert errors == {name: seen["error"] for name, seen in zip(CASES, second)}  # every rank, the same words
    said = {name: [(step, text) for step, text in seen["said"] if "could not" in text]
            for name, seen in zip(CASES, first)}  # fmt: skip
    whole = numbers(tmp_path / "sync")

    # a background save has the bytes of one in the foreground
    for step in (2, 4, 6):
        here, there = (tmp_path / name / "checkpoints" / step_name(step) for name in ("sync", "async"))
        files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (here, there)]
        assert {n for n in files[0] if files[0][n] != files[1].get(n)} == {".metadata"} and len(files[0]) == len(
            files[1]
        )
        assert metadata(here) == metadata(there)
    assert not errors["sync"] and not errors["async"] and numbers(tmp_path / "async") == whole

    # in the foreground: the policy decides
    assert errors["stop"].startswith("StorageError: the checkpoint of step 4 could not be written to")
    assert "rank 1: " in errors["stop"] and "File too large" in errors["stop"] and "bytes are free" in errors["stop"]
    assert saved(tmp_path / "stop") == [2] and len(numbers(tmp_path / "stop")) == 4
    assert errors["continue"] == "" and numbers(tmp_path / "continue") == whole
    assert saved(tmp_path / "continue") == [2, 6] and "going on (1 failed in a row" in said["continue"][0][1]
    assert "of step 4" in errors["too often"] and "complete checkpoint is of step 0" in errors["too often"]
    assert "of step 6" in errors["last"] and saved(tmp_path / "last") == [2, 4]  # the last one is never done without

    # in the background: told at the next step, begun anew at once, and then the policy
    for name, reason in {"writer raises": "File too large", "writer dies": "writer died with exit code 17"}.items():
        assert errors[name] == "" and numbers(tmp_path / name) == whole
        ((step, text),) = said[name]
        assert step == 5 and "rank 1: " in text and reason in text and "trying again with a new writer" in text
        assert saved(tmp_path / name) == [2, 5, 6]
    assert "of step 5 could not" in errors["writer fails twice"] and saved(tmp_path / "writer fails twice") == [2]
    assert "complete checkpoint is of step 2" in errors["unsaved"] and len(numbers(tmp_path / "unsaved")) == 5


def is_running(pid: int) -> bool:
    """Within five seconds."""
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.1)
    return True


KILLS = [("kill early", False), ("kill", False), ("kill late", False), ("kill", True), ("kill late", True),
         ("orphan", True)]  # fmt: skip


def test_a_kill_inside_a_save_of_either_kind(inputs: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # one import for all kills
    context.set_forkserver_preload(["megafuse.testing.save_faults"])
    whole = config(inputs, tmp_path / "whole")
    train(whole)
    for how, background in KILLS:
        settings = config(inputs, tmp_path / f"{how}-{background}", async_save=background)
        process = context.Process(target=break_saves_alone, args=(settings, how))
        process.start()
        process.join(300)
        root = settings.run_dir / "checkpoints"
        if (how, background) == ("kill", True):  # only the writer: the run went on
            assert process.exitcode == 0 and complete_steps(root) == [2, 5, 6]
        else:
            assert process.exitcode == -9 and complete_steps(root) == [2], (how, background)
            assert [p.name for p in root.glob("*.tmp")] == ["step_00000004.tmp"]
            if how == "orphan":  # the writer has gone with the rank
                texts = [p.read_text() for p in root.glob("*.tmp/*.distcp")]
                assert texts and not any(is_running(int(text.split()[0])) for text in texts if text)
            train(settings)
        assert saved(settings.run_dir)[-1] == 6 and numbers(settings.run_dir) == numbers(whole.run_dir)


def test_a_stop_waits_for_the_save_in_flight(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writer._write_file

    def slow(*args: Any) -> Any:
        time.sleep(1.0)
        return write(*args)

    def poll(one: Saver) -> None:  # of step 3: the writer of step 2 is not done
        if one._flight is not None:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(writer, "_write_file", slow)
    monkeypatch.setattr(Saver, "poll", poll)
    with pytest.raises(PreemptedError, match=r"after step 4, saved as .*step_00000004"):
        train(config(inputs, tmp_path / "run", async_save=True))
    assert saved(tmp_path / "run") == [2, 4] and len(numbers(tmp_path / "run")) == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 2 MiB of its own."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_small_or_read_only_disk_is_refused_before_the_first_step(inputs: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes, the file system has [\d,]+; free [\d,]+ bytes"):
        train(config(inputs, small_disk / "run"))
    assert not (small_disk / "run" / "metrics.jsonl").exists() and not (small_disk / "run" / "lock").exists()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        train(config(inputs, small_disk / "other"))
