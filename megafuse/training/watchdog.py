"""A thread beside the training loop of each rank: heartbeat, requests to stop, and an end to hangs.

The loop calls `beat(step, phase)` when it begins a phase. A rank without a beat for `hang_seconds` writes the stacks
of its threads to RUN/stacks/START/rank_00003.txt. A moment later the ranks that could write look at each other's files:
the first prints who did not arrive (no file: frozen or gone; an earlier step or phase: stuck there), and all end with
exit code 75. A collective of NCCL or gloo would wait for its own limit, 30 minutes, and then say less.

Covered: ranks that wait in a collective, sleep, loop, or are stopped. Not covered: a rank whose C code never gives up
the GIL (a timer of faulthandler ends that one, with its stacks and exit code 1); a hang of all hosts at once.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from megafuse.checkpoint.lock import RunLock
from megafuse.training.outcome import write_outcome
from megafuse.training.signals import StopRequest

HEARTBEAT = "heartbeat.json"
STACKS = "stacks"
EXIT_HANG = 75
PHASES = ("data", "update", "evaluate", "save")
_PATIENCE = {"save": 3.0}  # a phase that may take so many times longer
_FIRST = 3.0  # and so may everything in the first step: compilation, autotuning


class Watchdog:
    """See the module. A context manager around the training loop.

    Arguments:
        run_dir: the run folder.
        rank, world_size: of this process.
        hang_seconds: without a beat for so long the job is ended; 0 never.
        total: steps of the run, for the heartbeat.
        lock: the run folder's lock, on the one rank that holds it, which also writes RUN/heartbeat.json.
        stop: where requests to stop are collected.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float,
        total: int,
        lock: RunLock | None,
        stop: StopRequest,
        environ: Mapping[str, str],
    ) -> None:
        self._run_dir, self._rank, self._world = run_dir, rank, world_size
        self._hang, self._total, self._lock, self._stop = hang_seconds, total, lock, stop
        self._job = f"{environ.get('SLURM_JOB_ID', 'local')}.{environ.get('SLURM_RESTART_COUNT', '0')}"
        self._folder = run_dir / STACKS / self._job
        self._place = (0, "data")
        self._since = time.monotonic()
        self._first_step: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: TextIO | None = None

    def __enter__(self) -> "Watchdog":
        if self._hang:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._report.unlink(missing_ok=True)
            self._file = open(self._report.with_suffix(".gil"), "w")  # held open for the C timer
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(5)
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            with contextlib.suppress(OSError):
                Path(self._file.name).unlink()
                self._folder.rmdir()  # goes with the last rank, where there is nothing to read

    def beat(self, step: int, phase: str) -> None:
        """This rank begins `phase` of optimizer step `step` (from 1)."""
        if self._first_step is None:
            self._first_step = step
        self._place, self._since = (step, phase), time.monotonic()
        if self._file is not None:
            faulthandler.dump_traceback_later(self._limit() + 3 * self._grace + 5, exit=True, file=self._file)

    @property
    def _report(self) -> Path:
        return self._folder / f"rank_{self._rank:05d}.txt"

    @property
    def _grace(self) -> float:
        return min(10.0, max(1.0, self._hang / 4))

    def _limit(self) -> float:
        step, phase = self._place
        return self._hang * max(_PATIENCE.get(phase, 1.0), _FIRST if step == self._first_step else 1.0)

    def _watch(self) -> None:
        told, touched = (0, ""), 0.0
        while not self._over.wait(min(1.0, self._hang / 8) if self._hang else 1.0):
            if self._rank == 0:
                self._stop.poll()
                now = time.monotonic()
                if self._lock is not None and now - touched > 10:
                    self._lock.touch()
                    touched = now
                if self._place != told:
                    told = self._place
                    self._write_heartbeat()
            if self._hang and time.monotonic() - self._since > self._limit():
                self._end_hang()

    def _write_heartbeat(self) -> None:
        step, phase = self._place
        facts = {"step": step, "total": self._total, "phase": phase, "time": time.time(), "job": self._job,
                 "host": socket.gethostname(), "pid": os.getpid()}  # fmt: skip
        temporary = self._run_dir / f".{HEARTBEAT}.tmp"
        with contextlib.suppress(OSError):  # a full disk must not end the watch
            temporary.write_text(json.dumps(facts) + "\n")
            os.replace(temporary, self._run_dir / HEARTBEAT)

    def _end_hang(self) -> None:
        place, waited = self._place, time.monotonic() - self._since
        step, phase = place
        with open(self._report.with_suffix(".tmp"), "w") as file:
            head = {"rank": self._rank, "step": step, "phase": phase, "host": socket.gethostname(), "pid": os.getpid()}
            file.write(json.dumps(head) + "\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        os.replace(self._report.with_suffix(".tmp"), self._report)
        if self._over.wait(self._grace) or self._place != place:
            self._report.unlink(missing_ok=True)  # it went on after all
            return
        if self._rank == min(_reports(self._folder), default=self._rank):
            print(f"error: {verdict(self._folder, self._world, waited)}", file=sys.stderr, flush=True)
            write_outcome(self._run_dir, EXIT_HANG, f"hang in step {step}")
        if self._lock is not None:
            self._lock.release()
        sys.stdout.flush()
        self._over.wait(0.5)  # let the message through before the launcher kills its writer
        os._exit(EXIT_HANG)


def verdict(folder: Path, world_size: int, waited: float) -> str:
    """Who did not arrive, from the reports of the ranks in `folder`: the ranks, and where to read on."""
    heads = _reports(folder)
    places = {rank: (head["step"], PHASES.index(head["phase"])) for rank, head in heads.items()}
    silent = sorted(set(range(world_size)) - set(heads))
    furthest = max(places.values())
    behind = sorted(rank for rank, place in places.items() if place < furthest)
    step, phase = furthest[0], PHASES[furthest[1]]
    told = [f"rank {rank} gives no sign of life" for rank in silent]
    told += [f"rank {r} is still in step {places[r][0]}, phase {PHASES[places[r][1]]!r}" for r in behind]
    reason = "; ".join(told) or "all ranks are there: they wait for different collectives, or on the network"
    return f"no progress for {waited:.0f} s in step {step}, phase {phase!r}: {reason}. Stacks of all threads: {folder}"


def _reports(folder: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("rank_*.txt")):
        with contextlib.suppress(OSError, ValueError, KeyError), open(path) as file:
            head = json.loads(file.readline())
            found[int(head["rank"])] = head
    return found
