"""Calls in threads that nobody waits for when the work is interrupted."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`work` of each item, in their order, `threads` at a time.

    The first exception of `work`, or Ctrl-C, ends it at once: no further item is begun, and what is running is left to
    itself and dies with the process. A `ThreadPoolExecutor` would wait for it, which for a request can take minutes.
    """
    todo: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    for pair in enumerate(items):
        todo.put(pair)

    def serve() -> None:
        while not stop.is_set():
            try:
                index, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(item)))
            except BaseException as e:  # it belongs to the caller's thread
                done.put(e)
                return

    results: dict[int, Result] = {}
    try:
        for _ in range(min(threads, len(items))):
            threading.Thread(target=serve, daemon=True).start()
        while len(results) < len(items):
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            results[found[0]] = found[1]
    finally:
        stop.set()
    return [results[index] for index in range(len(items))]
