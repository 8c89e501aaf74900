"""Saves that fail: injected into one rank of a run, for tests that show what all ranks do then."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from megafuse.checkpoint import saver, writer
from megafuse.config.train import TrainConfig
from megafuse.errors import MegafuseError
from megafuse.parallel.topology import process_groups
from megafuse.training import run as training_run

_PLAN, _WRITE = saver.plan_save, writer._write_file
_POLL, _COMMIT = saver.Saver.poll, saver.Saver._commit


class SaveFault:
    """Rank `rank` fails to write the checkpoints with the numbers `saves`, from 1.

    how:
        limit: no file above 1000 bytes (EFBIG; a quota's EDQUOT comes the same way).
        raise: an OSError in the writer.
        exit: the background writer ends without a word, and the other ranks' writers take a minute.
        kill early, kill: SIGKILL of whoever writes, before the first byte or inside a file.
        kill late: SIGKILL of the rank, after its last byte and before the commit.
        orphan: SIGKILL of the rank, while its background writer is inside a file.
    """

    def __init__(self, config: TrainConfig, rank: int, saves: tuple[int, ...], how: str) -> None:
        self.how, self.saves, self.mine = how, saves, dist.get_rank() == rank
        self.said: list[tuple[int, str]] = []
        """What the run said, each with the number of steps recorded by then."""
        self._count, self._main = 0, os.getpid()
        self._metrics = config.run_dir / "metrics.jsonl"

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """In force inside the block."""
        with (
            patch.object(saver, "plan_save", self._plan_save),
            patch.object(writer, "_write_file", self._write_file),
            patch.object(saver.Saver, "poll", lambda one: self._poll(one)),
            patch.object(saver.Saver, "_commit", lambda one, flight: self._commit(one, flight)),
            patch.object(training_run._Run, "_say", lambda _, text: self._say(text)),
        ):
            yield

    @property
    def _now(self) -> bool:
        return self.mine and self._count in self.saves

    def _plan_save(self, *args: Any) -> Any:
        self._count += 1
        return _PLAN(*args)

    def _write_file(self, transforms: Any, number: int, bucket: Any) -> Any:
        if self.how == "exit" and self._count in self.saves:
            if self.mine:
                os._exit(17)
            time.sleep(60)
        if not self._now:
            return _WRITE(transforms, number, bucket)
        if self.how == "raise":
            return OSError("injected")
        if self.how in ("kill", "orphan"):
            Path(bucket[0]).write_text(f"{os.getpid()} writes half a file")
        if self.how in ("kill", "kill early"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "orphan":
            time.sleep(60)
        if self.how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            return _WRITE(transforms, number, bucket)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def _poll(self, one: saver.Saver) -> None:
        """Steps of real models are longer than these writers need, so wait for this rank's."""
        flight = one._flight
        if flight is not None and flight.writer is not None and (self.mine or self.how != "exit"):
            if self.how == "orphan" and self._now:
                while not any(file.stat().st_size for file in flight.plan.folder.glob("*.distcp")):
                    time.sleep(0.01)
                os.kill(self._main, signal.SIGKILL)
            wait([flight.writer._process.sentinel, flight.writer._pipe])
        _POLL(one)

    def _commit(self, one: saver.Saver, flight: Any) -> None:
        if self.how == "kill late" and self._now:
            if flight.writer is not None:
                flight.writer.wait()
            else:
                writer.write_files(flight.plan, flight.plan.staged())
            os.kill(self._main, signal.SIGKILL)
        _COMMIT(one, flight)

    def _say(self, text: str) -> None:
        steps = self._metrics.read_bytes().count(b"\n") if self._metrics.is_file() else 0
        self.said.append((steps, text))


def break_saves(config: TrainConfig, rank: int, saves: tuple[int, ...], how: str) -> dict[str, Any]:
    """Train `config` in the joined world under a SaveFault; `error` (text or empty), and what was `said`."""
    fault, error = SaveFault(config, rank, saves, how), ""
    with fault.injected():
        try:
            training_run.train(config)
        except MegafuseError as caught:
            error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "said": fault.said}


def break_saves_in_turn(cases: list[tuple[TrainConfig, int, tuple[int, ...], str]]) -> list[dict[str, Any]]:
    """`break_saves` for each of several runs: one start of the processes for all."""
    return [break_saves(*case) for case in cases]


def break_saves_alone(config: TrainConfig, how: str) -> None:
    """`break_saves` of the second checkpoint in a world of one."""
    with process_groups():
        break_saves(config, 0, (2,), how)
