"""One job a run folder: a second one would write into the first one's checkpoints and metrics.

RUN/lock says who holds the folder. flock() does not reach other nodes on many network file systems, so the lock is an
exclusively created file, and its owner touches it as long as it lives.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from megafuse.errors import ConfigError

LOCK = "lock"
STALE_SECONDS = 600.0
"""An owner on another host that has not touched its lock for so long is taken for dead."""


class RunLock:
    """A held lock, and a context manager that releases it. `touch` it now and then."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def touch(self) -> None:
        """Tell others that this job lives."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def release(self) -> None:
        """Give the folder free, unless another job has taken it over meanwhile."""
        owner = _read(self._path)
        if owner is not None and owner.get("token") == self._token:
            self._path.unlink(missing_ok=True)


def acquire(run_dir: Path, environ: Mapping[str, str]) -> RunLock:
    """Hold RUN/lock. One process of a job only.

    A lock is taken over when its owner is surely gone: a process of this host that does not exist any more, an earlier
    start of this very Slurm job, or an owner elsewhere that was silent for STALE_SECONDS.

    Raises:
        ConfigError: another job holds it; with its host, process id, job id, and when it last gave a sign of life.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    token = uuid.uuid4().hex
    process = psutil.Process()
    mine = {
        "token": token,
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "job": environ.get("SLURM_JOB_ID"),
        "restart": int(environ.get("SLURM_RESTART_COUNT", "0")),
    }
    for _ in range(10):
        try:
            with open(path, "x") as file:
                json.dump(mine, file)
            return RunLock(path, token)
        except FileExistsError:
            _take_over(path, mine)
    raise ConfigError(f"{path} comes back whenever it is removed: another job is starting on this run folder")


def _take_over(path: Path, mine: Mapping[str, Any]) -> None:
    """Remove a stale lock; return, for another try, where it is gone already. Raises ConfigError for a live one."""
    try:
        silent = _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return
    owner = _read(path)
    if owner is None:
        if silent < 5:  # created, and not yet written
            time.sleep(0.2)
            return
        owner = {}
    if not _is_gone(owner, mine, silent):
        job = f", Slurm job {owner['job']}" if owner.get("job") else ""
        raise ConfigError(
            f"{path.parent} is in use by process {owner.get('pid')} on host {owner.get('host')}{job} (last sign of "
            f"life {silent:.0f} s ago). End that job, or give another run_dir; a job that died without notice is taken "
            f"for dead after {STALE_SECONDS:.0f} s"
        )
    aside = path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # of two that find it stale, one gets it
        os.rename(path, aside)
        taken = _read(aside)
        if taken is not None and owner and taken.get("token") != owner.get("token"):
            os.rename(aside, path)  # it was a new one
        else:
            aside.unlink()


def _is_gone(owner: Mapping[str, Any], mine: Mapping[str, Any], silent: float) -> bool:
    if owner.get("job") and owner["job"] == mine["job"] and owner.get("restart", 0) < mine["restart"]:
        return True
    if owner.get("host") == mine["host"]:
        try:
            return bool(abs(psutil.Process(int(owner["pid"])).create_time() - float(owner["started"])) > 1.0)
        except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
            return True
    return silent > STALE_SECONDS


def _now(folder: Path) -> float:
    """The time by the clock that sets modification times there, which may not be this host's."""
    probe = folder / f".{LOCK}.{uuid.uuid4().hex}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def _read(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None
