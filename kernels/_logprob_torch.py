"""The `torch` backend of the log-prob kernels: plain PyTorch on any device, the reference for other backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.kernels._linear_parts import LinearOptions, WeightGradient, Workspace, close_gaps, wide_products
from megafuse.kernels._segments import pair_sums, segment_sums
from megafuse.kernels._vocab_softmax import (
    Head,
    RowStats,
    Scratch,
    TargetStats,
    add_row_stats,
    compute_dtype,
    gradient_at_targets,
    gradient_rows,
    merge,
)


class VocabParallelLogprobs(torch.autograd.Function):
    """Log-probs from logits [T, V_local]; with `inplace` the gradient takes the logits' memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, head: Head, inplace: bool) -> Tensor:
        z = logits[:, : head.columns]
        stats = RowStats.empty(z.shape[0], z)
        scratch = Scratch(z, z.shape[0], head, z.numel() * z.element_size())
        add_row_stats(stats, 0, z, scratch)
        raw = torch.zeros_like(stats.largest)
        column, _ = head.local(targets)
        if head.columns:
            raw.copy_(z.gather(1, column[:, None]).squeeze(1))
        found = merge(stats, None, raw, targets, head)
        ctx.save_for_backward(logits, targets, found.largest, found.target, found.total, found.x)
        ctx.head, ctx.inplace = head, inplace
        return found.logp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, *saved = ctx.saved_tensors
        head, found = ctx.head, TargetStats(*saved)
        # detach() shares the version counter: a second backward after an in-place one is refused by autograd.
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        z, dz = logits.detach()[:, : head.columns], out[:, : head.columns]
        scratch = Scratch(z, z.shape[0], head, z.numel() * z.element_size())
        gradient_rows(z, dz, found.largest, -grad / (head.temperature * found.total), scratch)
        out[:, head.columns :] = 0
        if head.columns:
            column, owned = head.local(targets)
            at_target = gradient_at_targets(found, grad.double(), grad.double(), head).to(dz.dtype)
            column = column[:, None]
            dz.scatter_(1, column, torch.where(owned, at_target, dz.gather(1, column).squeeze(1))[:, None])
        return out, None, None, None


class _Chunks:
    """Logits [R, columns] of consecutive hidden rows, in one buffer that is used again for every chunk.

    They are float32 (float64 for float64 operands): rounded to bfloat16 they would cost 0.01 nat a token and more.
    Products that a device cannot write wider than their factors (CPUs, old GPUs) are taken of upcast factors, a block
    of the weight at a time, which counts as workspace like the logits.

    The buffer has one element more than the logits: targets that are not of this chunk or of this rank are written
    there, which costs nothing and needs no boolean mask (whose size only the device knows).
    """

    def __init__(self, x: Tensor, weight: Tensor, head: Head, workspace_bytes: int):
        self.x, self.weight, self.head = x, weight[: head.columns], head
        self.dtype = compute_dtype(x)
        self.direct = x.dtype == self.dtype or wide_products(x.device, x.dtype, self.dtype)
        spare, columns = workspace_bytes // 4, max(head.columns, 1)
        self.scratch = Scratch(x, x.shape[0], head, spare if self.direct else spare // 2)
        # 1024 columns: more are no faster, and leave the cache.
        fit = (spare - self.scratch.bytes) // (x.shape[1] * self.dtype.itemsize)
        self.block = columns if self.direct else max(1, min(columns, fit, 1024))
        used = self.scratch.bytes + (0 if self.direct else self.block * x.shape[1] * self.dtype.itemsize)
        self.size = max(1, min(x.shape[0], (workspace_bytes - used) // (columns * self.dtype.itemsize)))
        self.starts = range(0, max(x.shape[0], 1), self.size)  # no rows: one empty chunk
        self.flat: Tensor | None = None

    def logits(self, first: int) -> Tensor:
        """This rank's logits of the chunk that starts at row `first`."""
        x = self.x[first : first + self.size]
        if self.flat is None:
            self.flat = x.new_empty(x.shape[0] * self.head.columns + 1, dtype=self.dtype)
        z = self.view(x.shape[0])
        if x.dtype == self.dtype:
            return torch.mm(x, self.weight.t(), out=z)
        if self.direct:
            kinds: dict[str, Any] = {"out_dtype": self.dtype, "out": z}
            return torch.mm(x, self.weight.t(), **kinds)
        x = x.to(self.dtype)
        for a in range(0, self.head.columns, self.block):
            part = self.weight[a : a + self.block].to(self.dtype)
            torch.mm(x, part.t(), out=z[:, a : a + self.block])
        return z

    def view(self, rows: int) -> Tensor:
        """The buffer as [rows, columns]."""
        assert self.flat is not None
        return self.flat[: rows * self.head.columns].view(rows, self.head.columns)

    def rounded(self) -> Tensor:
        """The same memory in the dtype of the operands [at least rows * columns + 1], for the logits' gradient.

        Row r begins where the logits of row r // 2 were: written in order, it covers nothing that is still to be read.
        """
        assert self.flat is not None
        return self.flat.view(self.x.dtype)

    def slots(self, first: int, rows: int, row: Tensor, targets: Tensor, place: Tensor | None = None) -> Tensor:
        """Indices into `flat` [T] of the targets in the chunk; the spare element for the others.

        `place [rows]`: where the chunk's rows were moved to, -1 for those that were given up.
        """
        column, owned = self.head.local(targets)
        inside = owned & (row >= first) & (row < first + rows)
        local = row - first
        if place is not None:
            local = torch.where(inside, place[local.clamp(0, rows - 1)], -1)
            inside &= local >= 0
        return torch.where(inside, local * self.head.columns + column, rows * self.head.columns)


class TorchRows:
    """`HeadRows` in plain PyTorch: the logits of distinct rows exist one chunk at a time, and become their gradient."""

    def __init__(self, full: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions, space: Workspace):
        rows = options.rows
        self.weight, self.targets, self.options = weight, targets, options
        self.x = full if rows.rows is None else full.index_select(0, rows.rows)
        self.row = torch.arange(rows.count, device=full.device) if rows.row is None else rows.row
        self.found: TargetStats | None = None
        self.kept: Tensor | None = None  # the logits, where they are one chunk
        self.parts = len(self._chunks().starts)

    @staticmethod
    def fit(weight: Tensor, workspace_bytes: int) -> int:
        """See `HeadRows`; `Scratch` and upcast columns get up to a quarter."""
        return max(1, workspace_bytes * 3 // 4 // max(weight.shape[0] * compute_dtype(weight).itemsize, 1))

    def _chunks(self) -> _Chunks:
        return _Chunks(self.x, self.weight, self.options.head, self.options.workspace_bytes)

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """See `HeadRows`."""
        head, chunks, targets = self.options.head, self._chunks(), self.targets
        stats = RowStats.empty(self.x.shape[0], self.x, entropy=self.options.entropy)
        raw = torch.zeros(targets.shape, dtype=compute_dtype(self.x), device=self.x.device)
        for first in chunks.starts:
            z = chunks.logits(first)
            add_row_stats(stats, first, z, chunks.scratch)
            assert chunks.flat is not None
            chunks.flat[z.numel()] = 0  # what targets of other chunks and ranks read
            raw += chunks.flat[chunks.slots(first, z.shape[0], self.row, targets)]
        self.found = merge(stats, self.row, raw, targets, head)
        # One chunk: its logits are kept, and `gradients` turns them into the gradient in place.
        self.kept = chunks.flat if self.parts == 1 and self.options.gradient else None
        entropy = stats.entropies(head)[self.row] if self.options.entropy else raw.new_empty(0)
        return self.found.logp(), entropy

    def gradients(
        self,
        grad: Tensor,
        dx: Tensor | None,
        dw: WeightGradient | None,
        then: Callable[[], None],
        keep: Tensor | None = None,
    ) -> None:
        """See `HeadRows`."""
        assert self.found is not None
        x = self.x
        largest, scale, at_target = self._coefficients(grad, self.found)
        wanted = self._rows_with(keep)
        chunks = self._chunks()
        chunks.flat, self.kept = self.kept, None  # overwritten below: a second backward computes the logits again
        have = chunks.flat is not None
        for first in chunks.starts:
            part = slice(first, min(first + chunks.size, x.shape[0]))
            mask = None if wanted is None else wanted[part]
            z = h = None
            place: Tensor | None = None
            if mask is None or bool(mask.any()):
                z = chunks.view(part.stop - first) if have else chunks.logits(first)
                h, top, factor = x[part], largest[part], scale[part]
                if mask is not None and not bool(mask.all()):
                    order = close_gaps(z, mask, self.options.workspace_bytes // 32)
                    z, h, top, factor = z[: order.numel()], h[order], top[order], factor[order]
                    place = torch.full(mask.shape, -1, device=x.device)
                    place[order] = torch.arange(order.numel(), device=x.device)
                flat = chunks.rounded()
                dz = flat[: z.numel()].view(z.shape)
                gradient_rows(z, dz, top, factor, chunks.scratch)
                flat[chunks.slots(first, part.stop - first, self.row, self.targets, place)] = at_target
                z = dz
            if dx is not None:
                _fill(dx[part], z, chunks.weight, place)
            if part.stop == x.shape[0]:
                then()
            if dw is not None and z is not None and h is not None:
                dw.add(z, h)

    def _coefficients(self, grad: Tensor, found: TargetStats) -> tuple[Tensor, Tensor, Tensor]:
        """(`largest` and `scale` of each row, as `gradient_rows` takes them, and the gradient at each target)."""
        head, rows = self.options.head, self.options.rows
        pair = total = grad.double()
        largest, scale = found.largest, -grad / (head.temperature * found.total)
        if rows.row is not None and rows.first is not None:
            by_row, _ = segment_sums(grad, self.row, rows.count)
            total = by_row[self.row]
            pair = pair_sums(grad, (self.row << 32) + self.targets.long())
            largest = largest[rows.first]
            scale = (-by_row / (head.temperature * found.total[rows.first])).to(scale.dtype)
        return largest, scale, gradient_at_targets(found, pair, total, head).to(self.x.dtype)

    def _rows_with(self, keep: Tensor | None) -> Tensor | None:
        """Which distinct rows [U] (host) predict a target of `keep`; None: all of them."""
        if keep is None or bool(keep.all()):
            return None
        wanted = torch.zeros(self.x.shape[0], dtype=torch.bool)
        wanted[self.row.cpu()[keep]] = True
        return wanted


def _fill(out: Tensor, z: Tensor | None, weight: Tensor, place: Tensor | None) -> None:
    """`out [R, H] = z @ weight`; with `place [R]`, row r is `place[r]` of the product, and 0 where that is -1."""
    if z is None:
        out.zero_()
    elif place is None and out.dtype == z.dtype:
        torch.mm(z, weight, out=out)
    elif place is None:
        out.copy_(torch.mm(z, weight))
    else:
        inside = place >= 0
        out.copy_(torch.where(inside[:, None], torch.mm(z, weight)[place.clamp(min=0)], 0))
