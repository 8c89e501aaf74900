"""What a row may hold: whole groups where prompts are shared, else the parts of a group that no term joins.

With its own copy of the prompt a response needs nothing of the group's others but what its terms combine. So a group
falls into parts, the connected components of its responses under the terms: an SFT response, a DPO pair, the responses
of one source for RLOO, a WRPO triple; a response in no term (kind `rank`) is a part of its own. Losses and metrics are
sums over terms, so a group's parts may lie in several rows, micro-batches and ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megafuse.data.types import Group, Part


@dataclass(frozen=True)
class Parts:
    """All parts of a data set with R responses in N groups, in its order."""

    responses: np.ndarray  # [R] int64: positions over all responses of the data set, those of a part together
    offsets: np.ndarray  # [U + 1] int64: part u is responses[offsets[u]:offsets[u + 1]], rising
    groups: np.ndarray  # [U] int64: the group of each part, rising
    first: np.ndarray  # [N + 1] int64: the parts of group g are first[g] to first[g + 1]
    starts: np.ndarray  # [N + 1] int64: where the responses of each group start, as in `GroupDataset`

    def of(self, groups: np.ndarray) -> np.ndarray:
        """The parts of `groups` [b], group after group. [k] int64."""
        spans = [np.arange(self.first[g], self.first[g + 1]) for g in groups]
        return np.concatenate([np.zeros(0, np.int64), *spans])

    def __getitem__(self, part: int) -> Part:
        group = int(self.groups[part])
        own = self.responses[self.offsets[part] : self.offsets[part + 1]] - self.starts[group]
        return Part(group, tuple(own.tolist()))


def data_parts(data: Any, *, prefix_sharing: bool) -> Parts:
    """The parts of `data`, a GroupDataset or what stands for one."""
    _, starts = data.response_lengths
    count = len(starts) - 1
    if prefix_sharing:
        every = np.arange(starts[-1])
        return Parts(every, starts, np.arange(count), np.arange(count + 1), starts)
    members, of_term = data.term_members
    label = components(members, of_term, int(starts[-1]))
    order = np.argsort(label, kind="stable")  # a label is the part's first response: groups keep their order
    begins = np.flatnonzero(np.diff(label[order], prepend=-1))
    groups = np.searchsorted(starts, order[begins], side="right") - 1
    return Parts(order, np.append(begins, len(order)), groups, np.searchsorted(groups, np.arange(count + 1)), starts)


def components(members: np.ndarray, offsets: np.ndarray, responses: int) -> np.ndarray:
    """The smallest of the responses that terms join each response with, directly or through others. [R] int64.

    members [E]: the responses of all terms one after the other, in [0, `responses`); offsets [M + 1]: those of term t
    are members[offsets[t]:offsets[t + 1]].
    """
    label = np.arange(responses, dtype=np.int64)
    sizes = np.diff(offsets)
    begins, sizes = offsets[:-1][sizes > 0], sizes[sizes > 0]
    while len(begins):
        least = np.minimum.reduceat(label[members], begins)
        before = label.copy()
        np.minimum.at(label, members, np.repeat(least, sizes))
        if np.array_equal(label, before):
            break
    return label


def groups_of(data: Any, parts: Iterable[Part]) -> list[Group]:
    """The groups of `data` cut down to `parts`, in their order."""
    return [data[part.group].only(part.responses) for part in parts]


def response_places(offsets: np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """Positions of the responses of `parts`, one behind the other, over all responses of the data set. [n] int64.

    offsets [N + 1]: where the responses of each group start.
    """
    own = [offsets[part.group] + np.array(part.responses, dtype=np.int64) for part in parts]
    return np.concatenate([np.zeros(0, np.int64), *own])
