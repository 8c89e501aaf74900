"""Which responses of a prompt FuseSFT trains on (FuseRL Appendix J), as indices into the prompt's responses.

Every function returns indices in descending reward. Equal rewards keep the order of the file: the earlier response
wins. That makes the result a function of the file alone, and ties show up in `megafuse data check`.
"""

from collections.abc import Sequence

import numpy as np

from megafuse.errors import ConfigError


def by_reward(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """All indices in descending reward, ties in file order. [n] int64."""
    return np.argsort(-np.asarray(rewards, dtype=np.float64), kind="stable")


def top_k_all(rewards: Sequence[float] | np.ndarray, k: int) -> np.ndarray:
    """The `k` highest-reward responses over ALL sources (the paper's default, k = 4); all of them where n < k.

    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"k must be >= 1, got {k}")
    return by_reward(rewards)[:k]


def top1_per_source(rewards: Sequence[float] | np.ndarray, sources: Sequence[str], k: int | None = None) -> np.ndarray:
    """The best response of every source, or of the `k` sources whose best response has the highest reward."""
    best: dict[str, int] = {}
    for i in by_reward(rewards):
        best.setdefault(sources[i], int(i))
    return np.fromiter(best.values(), dtype=np.int64)[:k]


def single_best(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """The one best response over all sources: the plain SFT baseline."""
    return by_reward(rewards)[:1]
