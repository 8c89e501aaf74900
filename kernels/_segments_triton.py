"""Autograd over the Triton kernels of the sums per response. Import only after `backend.choose` said `triton`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.kernels._collectives import gather_ranks
from megafuse.kernels._triton_segments import finish_segments, segment_gradient, segment_sum
from megafuse.kernels.backend import on_device

_SCAN, _BLOCK = 2048, 256


class TritonSegmentLogprobs(torch.autograd.Function):
    """The Triton twin of `_segments._SegmentLogprobs`: two launches forward, one backward, no sort."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, ids: Tensor, segments: int, mean: bool, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        logp, ids = logp.contiguous(), ids.contiguous()
        part = torch.empty((2, segments), dtype=torch.float64, device=logp.device)
        sums = torch.empty(segments, dtype=torch.float32, device=logp.device)
        counts = torch.empty(segments, dtype=torch.int64, device=logp.device)
        with on_device(logp):
            if segments:
                segment_sum[(segments,)](logp, ids, ids.numel(), segments, part, BLOCK=_SCAN, num_warps=8)
            parts = part[None] if group is None else gather_ranks(part, group)
            if segments:
                grid = (-(-segments // _BLOCK),)
                finish_segments[grid](parts, parts.shape[0], segments, sums, counts, MEAN=mean, BLOCK=_BLOCK)
        ctx.save_for_backward(ids, counts)
        ctx.mean, ctx.dtype = mean, logp.dtype
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        ids, counts = ctx.saved_tensors
        out = torch.empty(ids.shape, dtype=ctx.dtype, device=ids.device)
        with on_device(out):
            if out.numel():
                segment_gradient[(-(-out.numel() // _BLOCK),)](
                    *(ids, grad.contiguous(), counts, out, out.numel(), counts.numel()), MEAN=ctx.mean, BLOCK=_BLOCK
                )
        return out, None, None, None, None
