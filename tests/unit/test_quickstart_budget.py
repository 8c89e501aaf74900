"""How the quick start cuts its data to the time: more never fits on a slower machine, and what fits is used."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafuse.testing.examples import quickstart_module

budget = quickstart_module("budget")
SIZES = {"sft": {"groups": 70, "tokens": 16_000}, "pair": {"groups": 100, "tokens": 40_000},
         "rank": {"groups": 41, "tokens": 25_000}}  # fmt: skip
QUARTER = 15 * 60.0


def speed(tokens_per_second: float, start_seconds: float = 15.0) -> "budget.Speed":  # type: ignore[name-defined]
    return budget.Speed(8, 2400 / tokens_per_second, tokens_per_second, start_seconds, "fp32")


def test_a_fast_machine_takes_all_that_is_wanted() -> None:
    found = budget.plan(SIZES, speed(500), QUARTER)
    assert found.factor == 1 and found.prompts == {"sft": 61, "pair": 90, "rank": 41}


def test_a_slow_machine_takes_less_and_says_how_long() -> None:
    # what is planned is 765 s less eight starts of 30 s; 14 + 48 + 25 thousand tokens at 100/s take 870
    found = budget.plan(SIZES, speed(100, 30), QUARTER)
    assert found.factor == pytest.approx((0.85 * QUARTER - 8 * 30) / 870)
    assert found.prompts["pair"] == int(100 * found.factor * 36_000 / 40_000)


@given(st.floats(1, 1000), st.floats(1, 1000), st.floats(0, 120), st.floats(60, 7200), st.floats(0.05, 3))
def test_what_is_planned_fits(one: float, other: float, start: float, left: float, much: float) -> None:
    sizes = {kind: {name: max(1, round(much * n)) for name, n in size.items()} for kind, size in SIZES.items()}
    slower, faster = (budget.plan(sizes, speed(rate, start), left) for rate in sorted((one, other)))
    assert slower.factor <= faster.factor
    for found in (slower, faster):
        assert budget.LEAST <= found.factor <= 1
        assert all(1 <= found.prompts[kind] <= sizes[kind]["groups"] for kind in sizes)
        if found.factor > budget.LEAST:
            assert 60 * found.minutes <= left


def test_the_measurement_is_read_and_kept(tmp_path: Path) -> None:
    report = {
        "results": [{"prompts": 8, "step_seconds": 12.0, "tokens_per_second": 200.0}],
        "config": {"steps": 1, "warmup": 1, "model": {"precision": "fp32"}},
    }
    found = budget.read_speed(report, command_seconds=40.0)
    assert found == budget.Speed(8, 12.0, 200.0, 16.0, "fp32")
    assert budget.saved(tmp_path / "budget.json") is None
    chosen = budget.plan(SIZES, found, QUARTER)
    budget.save(tmp_path / "budget.json", found, chosen, {"seed": 0})
    assert budget.saved(tmp_path / "budget.json") == (found, chosen)


@pytest.mark.parametrize(("cores", "gib", "processes"), [(2, 23, 2), (16, 8, 2), (2, 7.9, 1), (16, 6, 1), (1, 64, 1)])
def test_two_processes_where_there_are_cores_and_memory(
    cores: int, gib: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "usable_cores", lambda: cores)
    monkeypatch.setattr(budget, "memory_bytes", lambda: int(gib * 2**30))
    assert budget.processes_here() == processes
