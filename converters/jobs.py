"""Work side by side: threads, because all that a conversion does (reading, hashing, writing) lets other threads run.

The first error ends all jobs: the others stop at their next block, and it is raised when none runs any more, so that
nobody writes into a folder that is being removed.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from megafuse.errors import ConfigError

T = TypeVar("T")
OnBytes = Callable[[int, int], None]  # (bytes done, bytes of all)


class Stopped(Exception):
    """Raised in a job that ends because another one failed; nobody outside of `run_jobs` sees it."""


class Meter:
    """Counts the bytes of all jobs, tells `show` (one call at a time), and is where jobs learn that they shall stop."""

    def __init__(self, total: int, show: OnBytes | None = None) -> None:
        self.total, self.done = total, 0
        self._show, self._lock, self._stop = show, threading.Lock(), threading.Event()
        self.add(0)

    def add(self, count: int) -> None:
        """`count` more bytes are done. Raises Stopped where another job has failed."""
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self.done += count
            if self._show:
                self._show(self.done, self.total)

    def stop(self) -> None:
        """Every later `add` raises."""
        self._stop.set()


def run_jobs(tasks: Sequence[Callable[[], T]], jobs: int, meter: Meter) -> list[T]:
    """What `tasks` answer, in their order, `jobs` of them at a time; with one job, in this thread.

    Raises the error of the first task that failed, or what interrupted this thread, after every task has ended.
    """
    if jobs == 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(jobs, thread_name_prefix="convert") as pool:
        futures = [pool.submit(_stopping, task, meter) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            meter.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]


def _stopping(task: Callable[[], T], meter: Meter) -> T:
    try:
        return task()
    except BaseException:
        meter.stop()
        raise


def check_jobs(jobs: int, block_mb: int) -> None:
    """Raises ConfigError where `jobs` or `block_mb` is less than 1."""
    for name, value in (("jobs", jobs), ("block_mb", block_mb)):
        if value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
