"""A row dealt to the context-parallel ranks.

The row is cut into stripes of equal width. Every rank gets as many of them, and they are dealt so that the visible keys
of each rank's queries, the attention's cost, come out nearly equal too. The LM head's triples go with the place that
predicts: a prompt's last place serves the first token of every response, on the one rank that owns it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megafuse.data.rows import Row

WIDEST = 128  # places of a stripe: a tile of the attention kernel, so that tiles stay sparse
FEWEST = 8  # stripes a rank, as long as a row has them


def stripe_width(tokens: int, ways: int) -> int:
    """The widest power of two up to 128 that cuts `tokens` places into at least 8 equal stripes a rank (or 1)."""
    width = 1
    while width < WIDEST and tokens % (2 * width * ways) == 0 and tokens >= 2 * width * ways * FEWEST:
        width *= 2
    return width


def visible_keys(layout: Tensor) -> Tensor:
    """How many keys the query at each place sees: its own segment so far, and its parent. [2, t] -> [t] int64"""
    segment, parent = layout.long()
    real = segment >= 0
    order = torch.arange(segment.numel())
    sizes = torch.bincount(segment[real], minlength=1)
    first = torch.zeros_like(sizes).scatter_reduce_(0, segment[real], order[real], "amin", include_self=False)
    shared = torch.where(parent != segment, sizes[parent.clamp(min=0)], 0)
    return torch.where(real, order - first[segment.clamp(min=0)] + 1 + shared, 0)


def owners(layout: Tensor, ways: int) -> Tensor:
    """The rank that owns each place of a row [2, t], t a multiple of `ways`. [t] int32

    Dearest stripe first, to the rank with the least so far among those that have room; the same on every rank.
    """
    tokens = layout.size(1)
    width = stripe_width(tokens, ways)
    cost = visible_keys(layout).view(-1, width).sum(1)
    room, load = [tokens // width // ways] * ways, [0] * ways
    owner = torch.zeros(len(cost), dtype=torch.int32)
    for stripe in torch.argsort(cost, descending=True, stable=True).tolist():
        rank = min((r for r in range(ways) if room[r]), key=lambda r: (load[r], r))
        owner[stripe], room[rank], load[rank] = rank, room[rank] - 1, load[rank] + int(cost[stripe])
    return owner.repeat_interleave(width)


def local_row(row: Row, rank: int, ways: int) -> Row:
    """The part of `row` that context-parallel `rank` of `ways` computes; its layout still describes the whole row."""
    if ways == 1:
        return row
    owner = owners(row.layout, ways)
    places = (owner == rank).nonzero().flatten()
    here = owner[row.target_rows] == rank
    return replace(
        row,
        tokens=row.tokens[:, places],
        positions=row.positions[places],
        layout=torch.cat((row.layout, owner[None])),
        targets=row.targets[here],
        target_rows=torch.searchsorted(places, row.target_rows[here]),
        target_response=row.target_response[here],
        blocks=replace(row.blocks, counts=_counts(row, owner, ways)),
    )


def _counts(row: Row, owner: Tensor, ways: int) -> Tensor:
    """How many targets of each response each rank's places predict. [ways, n] int64"""
    at = owner[row.target_rows].long() * row.num_responses + row.target_response
    return torch.bincount(at, minlength=ways * row.num_responses).view(ways, row.num_responses)
