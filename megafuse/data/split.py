"""Which side of the SFT : PO : eval split a prompt is on: a function of its id and the seed, of nothing else.

Adding, removing or reordering data therefore never moves a prompt from one side to another. The three draws of a prompt
come from separate bytes of one SHA-256, so that they are independent: changing `holdout` moves prompts in and out of
`eval` only, never between `sft` and `po`.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

Side = Literal["sft", "po", "eval"]
Part = Literal["sft", "po", "eval", "train", "all"]


@dataclass(frozen=True)
class Draws:
    """Three independent uniform numbers in [0, 1) of one prompt."""

    holdout: float  # < holdout fraction: the prompt is held out
    side: float  # < sft_fraction: the prompt is for SFT
    order: float  # rank of the prompt when only the first N are taken


def draws(prompt_id: str, seed: int) -> Draws:
    """The prompt's uniform numbers: 53 bits each of `SHA-256("seed:prompt_id")`, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    holdout, side, order = ((int.from_bytes(digest[i : i + 8], "big") >> 11) / 2.0**53 for i in (0, 8, 16))
    return Draws(holdout, side, order)


def hashed(seed: int, *parts: str | bool | None) -> bytes:
    """SHA-256 of the seed and the parts, each told apart from its neighbours: a fair sort key, the same everywhere."""
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()


def side_of(prompt_id: str, *, seed: int = 0, holdout: float = 0.0, sft_fraction: float = 0.4) -> Side:
    """The side of a prompt: `eval` with probability `holdout`, of the rest `sft` with probability `sft_fraction`.

    The papers split SFT:PO = 4:6 at random by prompt, which is the default.
    """
    draw = draws(prompt_id, seed)
    if draw.holdout < holdout:
        return "eval"
    return "sft" if draw.side < sft_fraction else "po"


def in_part(side: Side, part: Part) -> bool:
    """Whether a prompt of this side belongs to `part`; `train` is `sft` and `po`, `all` is everything."""
    return part == "all" or part == side or (part == "train" and side != "eval")
