"""Progress of a long command: a live bar on a terminal, a plain line now and then in a log file."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

from megafuse.observe.metrics import number

_SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda v: f"loss {v:.4f}"),
    ("margin", lambda v: f"margin {v:.4g}"),
    ("accuracy", lambda v: f"acc {v:.3f}"),
    ("grad_norm", lambda v: f"grad {v:.3g}"),
    ("lr", lambda v: f"lr {v:.2e}"),
    ("tokens_per_second", lambda v: f"{v:,.0f} tok/s"),
    ("mb_per_second", lambda v: f"{v:,.0f} MB/s"),
    ("mfu", lambda v: f"MFU {100 * v:.1f}%"),
)


class Progress:
    """Shows how far a training run or a forward-only pass has come. A context manager.

    On a terminal, a live bar with the metrics under it. Elsewhere (a Slurm log) plain lines: the first update, the
    last, and in between at most one each `interval` seconds. Everything goes to standard error, so that standard output
    stays for results. With `enabled=False` (every rank but one) nothing is written.

    Arguments:
        total: where the count ends: steps of a run, groups of a data set.
        title: short name, e.g. `train dpo`.
        enabled: whether this process shows anything.
        interval: seconds between plain lines.
        console: where to write; None for standard error.
        clock: monotonic seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        title: str,
        *,
        enabled: bool,
        interval: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.title = title
        self._enabled = enabled
        self._interval = interval
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._points: deque[tuple[float, int]] = deque(maxlen=64)  # (time, done): the rate is over the last of them
        self._printed: float | None = None
        self._unprinted: str | None = None
        self._bar: _Bar | None = None

    def __enter__(self) -> "Progress":
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _Bar(self.title, self.total, self._console)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._unprinted is not None:  # ended early: say how far it came
            self._print(self._unprinted)

    def update(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Show that `done` of the total are done.

        `metrics` is a record of metrics.jsonl or a part of one; what is known of it is shown (loss, margin, accuracy,
        grad_norm, lr, tokens_per_second, mb_per_second, mfu), the rest ignored. Time left follows from the recent
        updates, so that a run that goes on from a checkpoint is not taken for a fast one.
        """
        if not self._enabled:
            return
        now = self._clock()
        self._points.append((now, done))
        facts = describe(metrics or {})
        left = self._left(done)
        if self._bar is not None:
            self._bar.show(done, left, "  ".join(facts))
            return
        share = f" ({done / self.total:.1%})" if self.total else ""
        line = "  ".join([f"{self.title}  {done:,}/{self.total:,}{share}", *facts, *([left] if left else [])])
        if self._printed is None or done >= self.total or now - self._printed >= self._interval:
            self._print(line)
            self._printed = now
        else:
            self._unprinted = line

    def _left(self, done: int) -> str:
        """Time left as `ETA h:mm:ss`; empty at the end, and while only one point is known."""
        (first_time, first_done), (last_time, _) = self._points[0], self._points[-1]
        if done >= self.total or done <= first_done:
            return ""
        return f"ETA {clock_text((last_time - first_time) / (done - first_done) * (self.total - done))}"

    def _print(self, line: str) -> None:
        # Not console.print: it would fold the line at 80 columns where there is no terminal.
        print(line, file=self._console.file, flush=True)
        self._unprinted = None


def describe(metrics: Mapping[str, Any]) -> list[str]:
    """The known metrics as short texts: `["loss 0.6931", "lr 5.00e-07"]`. What is not finite shows as nan or inf."""
    found = {name: number(metrics, name) for name, _ in _SHOWN} | dict.fromkeys(metrics.get("nonfinite", ()), math.nan)
    return [text(value) for name, text in _SHOWN if (value := found[name]) is not None]


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss, with days where there are any: `2d 3:04:05`."""
    whole = round(seconds)
    days, whole = divmod(whole, 86400)
    text = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{days}d {text}" if days else text


class _Bar(bars.Progress):
    """rich's bar, with a line of metrics under it."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self._line = Text()
        super().__init__(
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self.add_task(title, total=total, left="")

    def show(self, done: int, left: str, line: str) -> None:
        """Move the bar to `done`, with the time left at its end and `line` under it."""
        self._line = Text(line, style="dim", overflow="ellipsis", no_wrap=True)
        self.update(self._task, completed=done, left=left)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the line."""
        yield from super().get_renderables()
        yield self._line
