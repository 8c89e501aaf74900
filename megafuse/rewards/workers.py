"""Processes that do one thing at a time, are killed when they take too long, and are then replaced."""

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from megafuse.errors import MegafuseError

_START_SECONDS = 120.0  # imports on a loaded machine; not counted against the first request


class Worker:
    """One process that answers each line of JSON with one line of JSON. Its imports do not count as work."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any] | None:
        """The answer, or None after `timeout` seconds or when the process died; it is then gone."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, timeout)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", self.module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(WARM_UP).encode() + b"\n")
        process.stdin.flush()
        if not self._line(process, _START_SECONDS).endswith(b"\n"):
            self.close()
            raise MegafuseError(f"the worker {self.module} does not start: run `python -m {self.module}` to see why")
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout: float) -> bytes:
        """What the process writes up to a line end, its own end, or the deadline."""
        assert process.stdout is not None
        deadline, data = time.monotonic() + timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return data
                block = os.read(process.stdout.fileno(), 1 << 16)
                if not block:
                    return data
                data += block
        return data

    def kill(self) -> None:
        """Kill the process, from any thread: an `ask` that waits for it ends with None."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kill the process and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._process = None


WARM_UP = {"gold": "\\frac{1}{2}", "text": "\\boxed{\\frac{2}{4}}"}  # makes the worker import what it needs


class WorkerPool:
    """A number of workers for one module; a context manager that kills them all at its end."""

    def __init__(self, module: str, workers: int, timeout: float) -> None:
        self.timeout = timeout
        self._workers = [Worker(module) for _ in range(workers)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def map(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        """The answer to each request, in order; None where a worker was killed for it."""

        def one(request: Mapping[str, Any]) -> dict[str, Any] | None:
            worker = self._free.get()
            try:
                return worker.ask(request, self.timeout)
            finally:
                self._free.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as pool:
            try:
                return list(pool.map(one, requests))
            except BaseException:  # Ctrl-C, above all: the threads, which the pool waits for, wait for these
                for worker in self._workers:
                    worker.kill()
                raise

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
