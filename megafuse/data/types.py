"""The prompt group: one prompt, all of its responses, and the loss terms over them. No term is ever split."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

KINDS = ("sft", "pair", "rloo", "wrpo", "rank")


class Part(NamedTuple):
    """Responses of one group that a row holds together: all of them, or some that no term joins with the others."""

    group: int  # position in the data set
    responses: tuple[int, ...]  # which of the group's, rising


@dataclass(frozen=True)
class Group:
    """One prompt group as training sees it, or (`only`) a part of it.

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
    chosen: tuple[int, ...] | None = None  # of a part: which of the group's responses these are; None: all
    counted: bool = True  # False: a part without the group's first term, which what counts groups must not count

    @property
    def response_lengths(self) -> np.ndarray:
        """Number of tokens of each response. [n] int64."""
        return np.array([len(r) for r in self.responses], dtype=np.int64)

    @property
    def part(self) -> Part:
        """Where this is from."""
        every = tuple(range(len(self.responses)))
        return Part(self.index, every if self.chosen is None else self.chosen)

    def only(self, responses: tuple[int, ...]) -> "Group":
        """The part of a whole group that holds these of its responses (rising), and their terms with their weights.

        Raises ValueError where a term involves one of them and one that is not among them.
        """
        if len(responses) == len(self.responses):
            return self
        place = np.full(len(self.responses) + 1, -1, dtype=np.int32)  # the last is that of the padding, -1
        place[list(responses)] = np.arange(len(responses))
        members, present = place[self.members], self.members >= 0
        inside = (members >= 0).any(1)
        if (present & (members < 0))[inside].any():
            term = self.members[inside & (present & (members < 0)).any(1)][0]
            raise ValueError(
                f"group {self.index} ({self.prompt_id!r}): responses {responses} split the term over {term.tolist()}"
            )
        return replace(
            self,
            responses=tuple(self.responses[i] for i in responses),
            sources=tuple(self.sources[i] for i in responses),
            rewards=self.rewards[list(responses)],
            members=members[inside],
            weights=self.weights[inside],
            chosen=responses,
            counted=bool(inside[:1].any()),
        )
