"""The `torch` backend of the log-prob kernels: plain PyTorch on any device, the reference for other backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.kernels._linear_parts import HiddenGradient, LinearOptions, WeightGradient, whole_sequence
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

    The buffer has one element more than the logits: targets that are not of this chunk or of this rank are written
    there, which costs nothing and needs no boolean mask (whose size only the device knows).
    """

    def __init__(self, x: Tensor, weight: Tensor, head: Head, workspace_bytes: int):
        self.x, self.weight, self.head = x, weight[: head.columns], head
        self.scratch = Scratch(x, x.shape[0], head, workspace_bytes // 4)
        row_bytes = max(head.columns, 1) * x.element_size()
        self.size = max(1, min(x.shape[0], (workspace_bytes - self.scratch.bytes) // row_bytes))
        self.starts = range(0, max(x.shape[0], 1), self.size)  # no rows: one empty chunk
        self.flat: Tensor | None = None

    def logits(self, first: int) -> Tensor:
        """This rank's logits of the chunk that starts at row `first`, in the dtype of the parameters."""
        x = self.x[first : first + self.size]
        if self.flat is None:
            self.flat = x.new_empty(x.shape[0] * self.head.columns + 1)
        return torch.mm(x, self.weight.t(), out=self.view(x.shape[0]))

    def view(self, rows: int) -> Tensor:
        """The buffer as [rows, columns]."""
        assert self.flat is not None
        return self.flat[: rows * self.head.columns].view(rows, self.head.columns)

    def slots(self, first: int, rows: int, row: Tensor, targets: Tensor) -> Tensor:
        """Indices into `flat` [T] of the targets in the chunk; the spare element for the others."""
        column, owned = self.head.local(targets)
        inside = owned & (row >= first) & (row < first + rows)
        return torch.where(inside, (row - first) * self.head.columns + column, rows * self.head.columns)


class LinearLogprobs(torch.autograd.Function):
    """Log-probs from hidden [T_h, H] and weight [V_local, H], the logits existing one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions
    ) -> tuple[Tensor, Tensor]:
        head, rows = options.head, options.rows
        full = whole_sequence(hidden, options)
        x = full if rows.rows is None else full.index_select(0, rows.rows)
        row = torch.arange(rows.count, device=x.device) if rows.row is None else rows.row
        chunks = _Chunks(x, weight, head, options.workspace_bytes)
        stats = RowStats.empty(rows.count, x, entropy=options.entropy)
        raw = torch.zeros(targets.shape, dtype=compute_dtype(x), device=x.device)
        for first in chunks.starts:
            z = chunks.logits(first)
            add_row_stats(stats, first, z, chunks.scratch)
            assert chunks.flat is not None
            chunks.flat[z.numel()] = 0  # what targets of other chunks and ranks read
            raw += chunks.flat[chunks.slots(first, z.shape[0], row, targets)]
        found = merge(stats, row, raw, targets, head)
        # Without a backward (no_grad, frozen inputs) autograd drops ctx, and all this with it, on return.
        ctx.save_for_backward(x, weight, targets, found.largest, found.target, found.total, found.x)
        ctx.options, ctx.hidden_rows = options, hidden.shape[0]
        # One chunk: its logits are kept, and backward turns them into the gradient in place.
        ctx.kept = chunks.flat if len(chunks.starts) == 1 else None
        entropy = stats.entropies(head)[row] if options.entropy else raw.new_empty(0)
        ctx.mark_non_differentiable(entropy)
        return found.logp(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, *saved = ctx.saved_tensors
        options, found = ctx.options, TargetStats(*saved)
        head, rows = options.head, options.rows
        need_x, need_w = ctx.needs_input_grad[:2]
        row = torch.arange(rows.count, device=x.device) if rows.row is None else rows.row
        pair = total = grad.double()
        largest, scale = found.largest, -grad / (head.temperature * found.total)
        if rows.row is not None and rows.first is not None:
            by_row, _ = segment_sums(grad, row, rows.count)
            total = by_row[row]
            pair = pair_sums(grad, (row << 32) + targets.long())
            largest = largest[rows.first]
            scale = (-by_row / (head.temperature * found.total[rows.first])).to(scale.dtype)
        at_target = gradient_at_targets(found, pair, total, head).to(x.dtype)

        chunks = _Chunks(x, weight, head, options.workspace_bytes)
        kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward computes the logits again
        dx = HiddenGradient(x, options, ctx.hidden_rows) if need_x else None
        dw = WeightGradient(weight, head.columns, len(chunks.starts), options.main_grad) if need_w else None
        for first in chunks.starts:
            if kept is not None:
                chunks.flat, z = kept, kept[:-1].view(x.shape[0], head.columns)
            else:
                z = chunks.logits(first)
            part = slice(first, first + z.shape[0])
            gradient_rows(z, z, largest[part], scale[part], chunks.scratch)
            assert chunks.flat is not None
            chunks.flat[chunks.slots(first, z.shape[0], row, targets)] = at_target
            if dx is not None:
                torch.mm(z, chunks.weight, out=dx.local[part])
                if part.stop == x.shape[0]:
                    dx.start()  # the ranks' parts travel while the weight's gradient is computed
            if dw is not None:
                dw.add(z, x[part])
        return dx.finish() if dx is not None else None, dw.result() if dw is not None else None, None, None
