"""Requests to stop: USR1 before a time limit, TERM from scancel, or a file in the run folder.

USR1 means "save and stop, to be started again" (exit code 85), TERM "save if there is time, and end" (exit code 143).
A handler only remembers; the ranks agree on the step at which they act. Before the first step there is nothing to save,
so there a request ends the process at once.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from megafuse.training.outcome import write_outcome

NONE, AGAIN, END = 0, 1, 2
EXIT_CODE = {AGAIN: 85, END: 143}
STOP_FILE = "stop"
_WANTS = {signal.SIGUSR1: AGAIN, signal.SIGTERM: END}
_REPEAT_SECONDS = 3.0  # Slurm and torchrun both pass a TERM on: the second of such a pair is no second request


class StopRequest:
    """What has been asked for so far: `wanted` is NONE, AGAIN or END. A context manager around the run.

    Signal handlers are set in the main thread only (elsewhere Python cannot), and put back at the end. A batch script
    that holds the only signal of a job writes `AGAIN` or `END` into RUN/stop, which `poll` reads.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._previous: dict[int, object] = {}
        self._first: float | None = None
        self.wanted = NONE
        self.can_save = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _WANTS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def poll(self) -> None:
        """Look for RUN/stop. One rank does so, beside the training loop."""
        try:
            word = self._file.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return
        self.ask({"AGAIN": AGAIN, "END": END}.get(word, NONE))

    def ask(self, wanted: int) -> None:
        """Remember the request; END wins over AGAIN. Where nothing can be saved yet, end the process."""
        self.wanted = max(self.wanted, wanted)
        if self.wanted and not self.can_save:
            write_outcome(self._file.parent, EXIT_CODE[self.wanted], "asked to stop before the first step")
            os._exit(EXIT_CODE[self.wanted])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is not None and now - self._first > _REPEAT_SECONDS and number == signal.SIGTERM:
            os._exit(EXIT_CODE[END])
        if self._first is None:
            self._first = now
        self.ask(_WANTS[signal.Signals(number)])
