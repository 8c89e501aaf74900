"""The split is a function of prompt_id and seed alone."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from megafuse.data.split import draws, in_part, side_of

IDS = [f"prompt-{i}" for i in range(20_000)]


def test_known_values() -> None:
    """The split of published data must never change: the draws, from the definition, computed apart."""
    digest = int(hashlib.sha256(b"7:alpacaeval-0000").hexdigest(), 16)
    draw = draws("alpacaeval-0000", 7)
    for value, shift in ((draw.holdout, 192), (draw.side, 128), (draw.order, 64)):
        assert value == ((digest >> shift) % 2**64 >> 11) / 2**53


def test_fractions() -> None:
    sides = [side_of(i, seed=1, holdout=0.1) for i in IDS]
    assert abs(sides.count("eval") / len(IDS) - 0.1) < 0.01
    assert abs(sides.count("sft") / (len(IDS) - sides.count("eval")) - 0.4) < 0.015
    assert {side_of(i, holdout=0.0) for i in IDS} == {"sft", "po"}
    assert {side_of(i, holdout=1.0) for i in IDS} == {"eval"}
    assert {side_of(i, sft_fraction=0.0) for i in IDS} == {"po"}


def test_holdout_moves_no_prompt_between_sft_and_po() -> None:
    for prompt_id in IDS[:2000]:
        small, large = side_of(prompt_id, holdout=0.05), side_of(prompt_id, holdout=0.3)
        assert large in (small, "eval")


def test_seeds_differ() -> None:
    assert [side_of(i, seed=0) for i in IDS[:100]] != [side_of(i, seed=1) for i in IDS[:100]]


@given(st.text(), st.integers())
def test_any_id(prompt_id: str, seed: int) -> None:
    draw = draws(prompt_id, seed)
    assert all(0 <= u < 1 for u in (draw.holdout, draw.side, draw.order))
    side = side_of(prompt_id, seed=seed, holdout=0.2)
    assert in_part(side, "all") and in_part(side, "train") == (side != "eval")
    assert [p for p in ("sft", "po", "eval") if in_part(side, p)] == [side]  # type: ignore[arg-type]
