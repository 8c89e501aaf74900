"""The order in which responses of one prompt are taken: falling reward, and between equal rewards no source first.

Verifier rewards are 0 or 1, so that most cuts go through a tie. A pure function of the data decides it, never the order
of a file or of a record's responses (a choice of ours: the papers are silent, their rewards hardly ever tie):

- Among equal rewards the sources take turns: the first response of each of them, then the second of each, and so on.
- Which source begins is decided by a hash of (seed, prompt_id, source), anew for every prompt: no source is preferred.
- Inside a source equal rewards are in the order of a hash of (seed, prompt_id, source, text and what else is known of
  the response), so that none but equal responses compare equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from megafuse.data.records import Response
from megafuse.data.split import hashed
from megafuse.errors import DataError


@dataclass(frozen=True)
class Ties:
    """What orders responses of equal reward of one prompt."""

    prompt_id: str
    seed: int  # of the build

    def source(self, name: str) -> bytes:
        """Sort key of a source: which of those with equal rewards comes first."""
        return hashed(self.seed, self.prompt_id, name)

    def response(self, r: Response) -> bytes:
        """Sort key of a response among those of its source that have its reward."""
        return hashed(self.seed, self.prompt_id, r.source, r.text, r.model, r.finish_reason, r.correct)


def rewards_of(responses: Sequence[Response]) -> np.ndarray:
    """Rewards as a vector. [n] float64.

    Raises:
        DataError: a response has no reward.
    """
    for response in responses:
        if response.reward is None:
            raise DataError(f"a response of source {response.source!r} has no reward: run `megafuse score` first")
    return np.array([r.reward for r in responses], dtype=np.float64)


def ranked(responses: Sequence[Response], ties: Ties, among: Sequence[int] | None = None) -> list[int]:
    """Indices of the responses (of those in `among`) in falling reward, sources of equal rewards in turn.

    Raises:
        DataError: a response has no reward.
    """
    indices = list(range(len(responses)) if among is None else among)
    levels: dict[float, list[int]] = {}
    for i, reward in zip(indices, rewards_of([responses[i] for i in indices]).tolist()):
        levels.setdefault(reward, []).append(i)
    return [i for reward in sorted(levels, reverse=True) for i in _in_turn(responses, ties, levels[reward])]


def _in_turn(responses: Sequence[Response], ties: Ties, tied: list[int]) -> list[int]:
    if len(tied) == 1:
        return tied
    own: dict[str, list[int]] = {}
    for i in tied:
        own.setdefault(responses[i].source, []).append(i)
    queues = [sorted(own[s], key=lambda i: ties.response(responses[i])) for s in sorted(own, key=ties.source)]
    return [i for turn in zip_longest(*queues) for i in turn if i is not None]


def first_of_sources(responses: Sequence[Response], order: Sequence[int]) -> list[int]:
    """The first index of every source in `order`."""
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(responses[i].source, i)
    return list(first.values())


def best_and_worst(responses: Sequence[Response], ties: Ties, among: Sequence[int]) -> tuple[int, int]:
    """The highest-reward response of `among`, which are of one source, and the lowest; of equal ones the first by hash.

    Raises:
        DataError: a response has no reward.
    """
    rewards = rewards_of([responses[i] for i in among])

    def first(reward: float) -> int:
        tied = [i for i, r in zip(among, rewards) if r == reward]
        return tied[0] if len(tied) == 1 else min(tied, key=lambda i: ties.response(responses[i]))

    return first(rewards.max()), first(rewards.min())


def cuts_a_tie(rewards: Sequence[float], k: int | None) -> bool | None:
    """Whether the k-th of some falling rewards equals the next, which is left out; None where k or they are none."""
    if k is None or not rewards:
        return None
    return k < len(rewards) and rewards[k - 1] == rewards[k]
