"""Autograd over the Triton kernels on logits. Import only after `backend.choose` said `triton`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.kernels._triton_logits import finish_rows, row_gradient, row_stats
from megafuse.kernels._vocab_softmax import Head
from megafuse.kernels.backend import on_device

ROWS = 128  # rows of one program of the small per-row kernels


def block_size(columns: int) -> int:
    """Columns that one step covers: wide enough to keep the memory pipe full, 16 elements a thread."""
    return min(max(triton.next_power_of_2(columns), 16), 4096)


class TritonVocabParallelLogprobs(torch.autograd.Function):
    """The Triton twin of `_logprob_torch.VocabParallelLogprobs`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, head: Head, inplace: bool) -> Tensor:
        rows = logits.shape[0]
        stats = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
        logp = stats.new_empty(rows)
        saved = torch.empty_like(stats)
        targets = targets.contiguous()
        transform = _transform_arguments(head)
        with on_device(logits):
            if rows:
                block = block_size(head.columns)
                row_stats[(rows,)](
                    *(logits, logits.stride(0), targets, stats, rows, head.start, head.columns, *transform),
                    BLOCK=block,
                    num_warps=8 if block >= 2048 else 4,
                )
            parts = head.gather_checking_shards(stats).contiguous()
            if rows:
                finish_rows[(triton.cdiv(rows, ROWS),)](parts, parts.shape[0], logp, saved, rows, BLOCK=ROWS)
        ctx.save_for_backward(logits, targets, saved)
        ctx.head, ctx.inplace = head, inplace
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, saved = ctx.saved_tensors
        head: Head = ctx.head
        rows, width = logits.shape
        # detach() shares the version counter; Triton's writes are counted by hand, to refuse a second backward.
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        block = block_size(width)
        with on_device(logits):
            if rows and width:
                row_gradient[(rows * triton.cdiv(width, block),)](
                    *(logits, logits.stride(0), out, out.stride(0), targets, saved, grad.contiguous()),
                    *(rows, head.start, head.columns, width, *_transform_arguments(head)),
                    BLOCK=block,
                    num_warps=8 if block >= 2048 else 4,
                )
        if ctx.inplace:
            torch.autograd.graph.increment_version(out)
        return out, None, None, None


def _transform_arguments(head: Head) -> tuple[float, float, bool]:
    """`scale, cap, CAPPED` of `_triton_math.transform`."""
    return 1.0 / head.temperature, head.softcap or 1.0, head.softcap is not None
