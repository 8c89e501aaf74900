"""Log-softmax of chosen entries over a vocabulary that is split over ranks, without ever holding float32 logits.

Write z = softcap * tanh(logit / softcap) / temperature for the transformed logits, y for a target and m = max z. The
log-prob is computed from the OTHER entries:

    s = sum_{j != y} exp(z_j - m)      x = (m - z_y) + log s      log p = -softplus(x)      1 - p = sigmoid(x)

so log p never exceeds 0, and both log p and 1 - p keep their relative precision when the model is nearly certain, where
`z_y - logsumexp(z)` and `p - 1` cancel to 0 in float32. A hidden row may predict several targets, so a row stores the
sum over all entries but its largest (`rest`); for a target that is not the largest, s = 1 + rest - exp(z_y - m) >= 1.

Blocks of rows are copied to a float32 (float64 for float64 logits)
scratch that fits in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.errors import ConfigError
from megafuse.kernels._collectives import gather_ranks

_LANE = 64  # columns that one step of the two-level argmax covers


@dataclass(frozen=True)
class Head:
    """What turns this rank's logits into log-probs: the shard's place, and the transformation."""

    start: int  # global id of column 0
    columns: int  # columns of this shard that are inside the true vocabulary; the rest is padding
    temperature: float
    softcap: float | None
    group: dist.ProcessGroup | None  # None: the vocabulary is whole

    def transform_(self, z: Tensor) -> Tensor:
        """Logits to z, in place."""
        if self.softcap is not None:
            return z.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`(column, owned)` of global ids [T]; the column is clamped where another rank owns the id."""
        column = targets.long() - self.start
        owned = (column >= 0) & (column < self.columns)
        return column.clamp(0, max(self.columns - 1, 0)), owned

    def gather(self, t: Tensor) -> Tensor:
        """Every rank's `t` [ranks, *t.shape]."""
        return t[None] if self.group is None else gather_ranks(t, self.group)

    def gather_checking_shards(self, t: Tensor) -> Tensor:
        """`gather` of a float tensor that also refuses shards with an id in common: ConfigError on a CPU, else NaN.

        The shards' borders are two more numbers of a gather that happens anyhow: no collective and no wait for the
        device are added, only some ten launches on [ranks, ranks] numbers. A check once a group would be cheaper, but
        it would trust the first call's borders for ever, and ranks that forget differently would hang. Borders
        are rounded to the dtype of `t`: that keeps their order, so no good shards are refused.
        """
        if self.group is None:
            return t[None]
        n = t.numel()
        mine = t.new_empty(n + 2)
        mine[:n] = t.flatten()
        mine[n].fill_(self.start)  # fill_: a tensor made from a list would be copied to the device, which waits for it
        mine[n + 1].fill_(self.start + self.columns)
        every = gather_ranks(mine, self.group)
        parts = every[:, :n].reshape(self.group.size(), *t.shape)
        return _refuse_overlap(every[:, n], every[:, n + 1], parts, look=t.device.type == "cpu")


def _refuse_overlap(first: Tensor, end: Tensor, parts: Tensor, *, look: bool) -> Tensor:
    """`parts [W, ..]`, rank r's shard being the ids `first[r]` to `end[r] - 1`; `look` at them and raise, or NaN."""
    low, high = torch.maximum(first[:, None], first), torch.minimum(end[:, None], end)
    shared = (low < high).triu(1)
    if not look:
        return parts.masked_fill(shared.any(), torch.nan)
    if bool(shared.any()):
        a, b = shared.nonzero()[0].tolist()
        raise ConfigError(
            f"vocab_start={int(first[b])} on rank {b} of the group: ranks {a} and {b} both hold the ids "
            f"{int(low[a, b])} to {int(high[a, b]) - 1}; vocab_start is the first id of a rank's own shard"
        )
    return parts


def compute_dtype(t: Tensor) -> torch.dtype:
    """Arithmetic and result dtype: float32, but float64 for float64 inputs, which serve as the oracle."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class Scratch:
    """The float32 workspace of one block of rows; `max_bytes` bounds it, one row at least."""

    def __init__(self, like: Tensor, rows: int, head: Head, max_bytes: int):
        self.head = head
        self.width = -(-max(head.columns, 1) // _LANE) * _LANE
        # CPU: stay in the second-level cache. CUDA: enough to fill the device, without a launch-bound loop.
        budget = min(1 << 20 if like.device.type == "cpu" else 1 << 28, max_bytes)
        buffers = 2 if head.softcap is not None else 1
        dtype = compute_dtype(like)
        self.rows = max(1, min(rows, budget // (buffers * self.width * dtype.itemsize)))
        self.z = torch.empty((self.rows, self.width), dtype=dtype, device=like.device)
        self.slope = torch.empty_like(self.z) if buffers == 2 else None
        self.bytes = buffers * self.z.numel() * dtype.itemsize

    def blocks(self, rows: int) -> Iterator[slice]:
        """Slices that cover `rows`."""
        return (slice(a, min(a + self.rows, rows)) for a in range(0, rows, self.rows))


@dataclass
class RowStats:
    """Of this rank's columns, a row: the largest z, its column, and the sum of exp(z - largest) over the others."""

    largest: Tensor  # [U] float32 or float64
    rest: Tensor  # [U]
    top: Tensor  # [U] int64
    spread: Tensor | None = None  # [U] sum of exp(z - largest) (z - largest), where entropies are wanted

    @staticmethod
    def empty(rows: int, like: Tensor, *, entropy: bool = False) -> RowStats:
        """Statistics of rows without any column."""
        rest = torch.zeros(rows, dtype=compute_dtype(like), device=like.device)
        spread = torch.zeros_like(rest) if entropy else None
        return RowStats(torch.full_like(rest, -torch.inf), rest, torch.zeros_like(rest, dtype=torch.int64), spread)

    def entropies(self, head: Head) -> Tensor:
        """Entropy [U] in nats of each row's distribution over the whole vocabulary: one all_gather of [3, U]."""
        assert self.spread is not None
        mine = torch.stack([self.largest, 1 + self.rest, self.spread])
        parts = head.gather(mine)
        gap = parts[:, 0] - parts[:, 0].amax(0)
        share = torch.exp(gap)
        total = (parts[:, 1] * share).sum(0)
        spread = torch.where(share > 0, share * (parts[:, 2] + gap * parts[:, 1]), 0).sum(0)
        return torch.log(total) - spread / total


def _max(z: Tensor) -> tuple[Tensor, Tensor]:
    """`z.max(1)` for a width that is a multiple of 64; torch's own is ten times slower than amax on a CPU."""
    lanes = z.view(z.shape[0], -1, _LANE)
    lane = lanes.amax(2).argmax(1, keepdim=True)
    best, offset = lanes.gather(1, lane[:, :, None].expand(-1, 1, _LANE)).squeeze(1).max(1)
    return best, lane.squeeze(1) * _LANE + offset


def add_row_stats(stats: RowStats, first: int, logits: Tensor, scratch: Scratch) -> None:
    """Fill `stats` for rows `first ...` from `logits [R, columns]`, which are left alone."""
    head = scratch.head
    if head.columns == 0:
        return
    for rows in scratch.blocks(logits.shape[0]):
        z = scratch.z[: rows.stop - rows.start]
        head.transform_(z[:, : head.columns].copy_(logits[rows]))
        z[:, head.columns :] = -torch.inf
        best, top = _max(z)
        z.sub_(best.masked_fill(best == -torch.inf, 0)[:, None]).exp_()
        z.scatter_(1, top[:, None], 0)
        out = slice(first + rows.start, first + rows.stop)
        stats.largest[out], stats.rest[out], stats.top[out] = best, z.sum(1), top
        if stats.spread is not None:
            stats.spread[out] = -torch.special.entr(z).sum(1)


@dataclass
class TargetStats:
    """Of the whole vocabulary, a target (the same on every rank)."""

    largest: Tensor  # [T] max z of the target's row
    target: Tensor  # [T] z_y; -inf where no rank owns the id
    total: Tensor  # [T] sum over all entries of exp(z - largest)
    x: Tensor  # [T] log((1 - p) / p)

    def logp(self) -> Tensor:
        """log p = -softplus(x) [T]."""
        return -(self.x.clamp(min=0) + torch.log1p(torch.exp(-self.x.abs())))


def merge(stats: RowStats, row: Tensor | None, raw: Tensor, targets: Tensor, head: Head) -> TargetStats:
    """Statistics of the targets from this rank's rows and the other ranks': one all_gather of [3, T] and two numbers.

    `row [T]` is the row of each target (None: its own), `raw [T]` its logit where this rank owns it. The ranks' parts
    are added in rank order, so that every rank has the same bits.
    """
    column, owned = head.local(targets)
    largest, rest, top = stats.largest, stats.rest, stats.top
    if row is not None:
        largest, rest, top = largest[row], rest[row], top[row]
    target = head.transform_(raw).masked_fill(~owned, -torch.inf)
    share = torch.where(owned, torch.exp(target - largest), 0)
    others = torch.where(owned & (column == top), rest, 1 + rest - share)
    mine = torch.stack([largest, others, target])
    parts = head.gather_checking_shards(mine)
    largest = parts[:, 0].amax(0)
    others = (parts[:, 1] * torch.exp(parts[:, 0] - largest)).sum(0)
    target = parts[:, 2].amax(0)
    gap = largest - target
    return TargetStats(largest, target, others + torch.exp(-gap), gap + torch.log(others))


def gradient_rows(logits: Tensor, out: Tensor, largest: Tensor, scale: Tensor, scratch: Scratch) -> None:
    """`out [R, columns] = scale * exp(z - largest) * d(softcap)`: the gradient everywhere but at the targets.

    `scale [R]` is minus the row's incoming gradient over (temperature * total). `out` may be `logits`, or
    the front of its memory in a narrower dtype: no row is written over one that is still to be read.
    """
    head = scratch.head
    if head.columns == 0:
        return
    for rows in scratch.blocks(logits.shape[0]):
        z = scratch.z[: rows.stop - rows.start, : head.columns].copy_(logits[rows])
        if scratch.slope is not None and head.softcap is not None:
            slope = scratch.slope[: z.shape[0], : head.columns]
            torch.tanh(z.div_(head.softcap), out=z)
            torch.mul(z, z, out=slope).neg_().add_(1)
            z.mul_(head.softcap / head.temperature)
        elif head.temperature != 1.0:
            z.div_(head.temperature)
        z.sub_(largest[rows, None]).exp_().mul_(scale[rows, None])
        if scratch.slope is not None:
            z.mul_(slope)
        out[rows] = z


def gradient_at_targets(found: TargetStats, pair: Tensor, row: Tensor, head: Head) -> Tensor:
    """The gradient at (row, y) [T]: `pair - p * row`, with p written as 1 - (1 - p) so that nothing cancels.

    `pair [T]`, `row [T]` float64: the incoming gradients summed over the targets with this row and id, and with this
    row. Targets with equal row and id get equal values.
    """
    grad = ((pair - row) + torch.sigmoid(found.x.double()) * row) / head.temperature
    if head.softcap is not None:
        grad = grad * (1 - (found.target.double() * (head.temperature / head.softcap)).square())
    return grad
