"""The prompt group: one prompt, all of its responses, and the loss terms over them. Never split anywhere."""

from dataclasses import dataclass

import numpy as np

KINDS = ("sft", "pair", "rloo", "wrpo", "rank")


@dataclass(frozen=True)
class Group:
    """One prompt group as training sees it.

    A term is one summand of the loss: `members[t]` are the responses that it involves (see docs/ARCHITECTURE.md for the
    meaning by kind of data set) and `weights[t]` its weight; the weights of a group sum to 1.
    """

    index: int  # position in the data set
    prompt_id: str
    prompt: np.ndarray  # [P] int32
    responses: tuple[np.ndarray, ...]  # n arrays [R_i] int32, end-of-turn included
    sources: tuple[str, ...]  # n
    rewards: np.ndarray  # [n] float64
    members: np.ndarray  # [m, k] int32, -1 pads
    weights: np.ndarray  # [m] float64

    @property
    def response_lengths(self) -> np.ndarray:
        """Number of tokens of each response. [n] int64."""
        return np.array([len(r) for r in self.responses], dtype=np.int64)
