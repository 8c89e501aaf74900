import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from megafuse.observe.progress import Progress, clock_text, describe


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_run(total: int, seconds: Callable[[int], float], first: int = 1, last: int | None = None) -> list[str]:
    clock, out = Clock(), io.StringIO()
    with Progress(total, "train dpo", enabled=True, console=Console(file=out, width=40), clock=clock) as progress:
        for step in range(first, (last or total) + 1):
            clock.now += seconds(step)
            progress.update(step, {"loss": 0.5})
    return out.getvalue().splitlines()


def steps(lines: list[str]) -> list[int]:
    return [int(re.findall(r"  ([\d,]+)/", line)[0].replace(",", "")) for line in lines]


def test_plain_lines_first_last_and_one_each_ten_seconds() -> None:
    lines = plain_run(100, lambda step: 1.0)
    assert steps(lines) == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[0] == "train dpo  1/100 (1.0%)  loss 0.5000"
    assert lines[1] == "train dpo  11/100 (11.0%)  loss 0.5000  ETA 0:01:29"
    assert lines[-1] == "train dpo  100/100 (100.0%)  loss 0.5000"
    assert steps(plain_run(1000, lambda step: 0.001)) == [1, 1000]
    assert steps(plain_run(4, lambda step: 60.0)) == [1, 2, 3, 4]


def test_a_run_that_ends_early_says_how_far_it_came() -> None:
    assert steps(plain_run(100, lambda step: 0.1, last=37)) == [1, 37]
    assert steps(plain_run(100, lambda step: 20.0, last=3)) == [1, 2, 3]


def test_time_left_of_a_resumed_run_is_not_fooled_by_the_steps_before() -> None:
    lines = plain_run(1000, lambda step: 10.0, first=900)
    assert "ETA" not in lines[0] and lines[1].endswith("ETA 0:16:30")


def test_time_left_follows_recent_steps() -> None:
    lines = plain_run(1000, lambda step: 1000.0 if step < 10 else 10.0)
    assert lines[499].endswith(f"ETA {clock_text(500 * 10)}")


def test_long_lines_are_not_folded_and_disabled_is_silent() -> None:
    out = io.StringIO()
    metrics = {"loss": 1, "grad_norm": 2.0, "lr": 1e-6, "tokens_per_second": 12345.6, "mfu": 0.384}
    with Progress(5, "t", enabled=True, console=Console(file=out, width=20)) as progress:
        progress.update(1, metrics)
    assert out.getvalue() == "t  1/5 (20.0%)  loss 1.0000  grad 2  lr 1.00e-06  12,346 tok/s  MFU 38.4%\n"
    with Progress(5, "t", enabled=False, console=Console(file=out, force_terminal=True)) as progress:
        progress.update(1, metrics)
    assert out.getvalue().count("\n") == 1


def test_forward_only_pass_and_empty_total() -> None:
    out = io.StringIO()
    with Progress(300, "reference", enabled=True, console=Console(file=out)) as progress:
        progress.update(64, {"tokens_per_second": 2e6})
        progress.update(300)
        shown = out.getvalue().splitlines()  # the end is told at once, not when the command is over
    assert shown == ["reference  64/300 (21.3%)  2,000,000 tok/s", "reference  300/300 (100.0%)"]
    assert out.getvalue().splitlines() == shown
    with Progress(0, "none", enabled=True, console=Console(file=out)) as progress:
        progress.update(0)
    assert out.getvalue().splitlines()[-1] == "none  0/0"


@pytest.mark.parametrize("width", [50, 100])
def test_terminal_shows_a_live_bar_of_two_lines(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, _environ={"TERM": "xterm"})
    clock = Clock()
    with Progress(10, "train dpo", enabled=True, console=console, clock=clock) as progress:
        for step in range(1, 6):
            clock.now += 2
            progress.update(step, {"loss": 0.25, "margin": 0.1, "lr": 1e-6})
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "").split("\n")
    bar = [line for line in frames if "5/10" in line][-1]
    assert "train dpo" in bar and "50%" in bar and len(bar.rstrip()) <= width
    below = [line for line in frames if "loss 0.2500" in line][-1]
    assert below.startswith("loss 0.2500  margin 0.1  lr 1.00e-06")
    assert "ETA 0:00:10" in bar or width < 60


def test_a_failing_body_leaves_the_terminal_and_the_error() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    with pytest.raises(RuntimeError, match="boom"), Progress(3, "t", enabled=True, console=console):
        raise RuntimeError("boom")
    assert "\x1b[?25h" in console.file.getvalue()  # type: ignore[attr-defined]  # the cursor is back


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, []),
        ({"loss": None, "nonfinite": ["loss", "odd"]}, ["loss nan"]),
        ({"loss": float("inf"), "accuracy": 0.5}, ["loss inf", "acc 0.500"]),
        ({"reward_margin": 9.0, "margin": 2.0, "accuracy": 0.75, "other": 1}, ["margin 2", "acc 0.750"]),
        ({"mfu": None}, []),
    ],
)
def test_describe(metrics: dict[str, Any], expected: list[str]) -> None:
    assert describe(metrics) == expected


def test_clock_text() -> None:
    assert [clock_text(s) for s in (0, 59.6, 3661, 2 * 86400 + 5)] == ["0:00:00", "0:01:00", "1:01:01", "2d 0:00:05"]
