"""Segmented sums that are the same on every run: a stable sort and one sequential float64 sum a segment, no atomics."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.errors import ConfigError, DataError
from megafuse.kernels._arguments import INDEX_TYPES
from megafuse.kernels._collectives import gather_ranks
from megafuse.kernels.backend import choose


def segment_sums(values: Tensor, ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Sum `values [T]` by `ids [T]` (any order, negative ids ignored): `([N] float64 sums, [N] int64 counts)`.

    The order of addition is the order of the tokens, so the result does not depend on the device's scheduling.
    Nothing is copied to the host.
    """
    # Ignored tokens go to a segment of their own, past the end, so that a NaN among them spoils nothing.
    key = torch.where(ids < 0, num_segments, ids)
    counts = torch.zeros(num_segments + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, key, torch.ones_like(key))  # integers: exact in any order
    data = values.double()[torch.argsort(key, stable=True)]
    sums = torch.segment_reduce(data, "sum", lengths=counts, unsafe=True, initial=0)
    return sums[:num_segments], counts[:num_segments]


def pair_sums(values: Tensor, keys: Tensor) -> Tensor:
    """For each of `keys [T]`, the float64 sum of the `values [T]` whose key is equal."""
    order = torch.argsort(keys, stable=True)
    ranked = keys[order]
    starts = torch.ones_like(ranked)
    starts[1:] = ranked[1:] != ranked[:-1]
    ids = torch.empty_like(keys)
    ids[order] = starts.cumsum(0) - 1
    return segment_sums(values, ids, keys.numel())[0][ids]


class _SegmentLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, ids: Tensor, num_segments: int, mean: bool, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = segment_sums(logp, ids, num_segments)
        if group is not None:
            # Gathered and added in rank order: bit-equal on every rank whatever all-reduce algorithm the backend likes.
            # float64 counts tokens exactly up to 2^53.
            every = gather_ranks(torch.stack([sums, counts.double()]), group)
            sums, counts = every[:, 0].sum(0), every[:, 1].sum(0).long()
        scale = counts.clamp(min=1).double().reciprocal() if mean else None
        ctx.save_for_backward(ids, scale)
        ctx.dtype = logp.dtype
        ctx.mark_non_differentiable(counts)
        sums = sums if scale is None else sums * scale
        return sums.to(torch.float64 if logp.dtype == torch.float64 else torch.float32), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        ids, scale = ctx.saved_tensors
        grad = grad.double() if scale is None else grad.double() * scale
        padded = torch.cat([grad, grad.new_zeros(1)])  # the last entry is what ignored tokens read
        return padded[torch.where(ids < 0, grad.numel(), ids)].to(ctx.dtype), None, None, None, None


def segment_logprobs(
    logp: Tensor,
    segment_ids: Tensor,
    num_segments: int,
    *,
    normalize: Literal["none", "mean"] = "none",
    cp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per-response sums (or means) of token log-probs, and the number of tokens of each response.

    `logp [T]` any float dtype; `segment_ids [T]` int64 or int32 in `[0, num_segments)` in any order, negative ones
    ignored. Returns `([N], [N] int64)`; the sums are accumulated in float64, then rounded to float32 (unless logp is
    float64). A segment without tokens has sum, mean and length 0. With `cp_group` every rank passes its own tokens and
    receives the completed sums; the gradient of the completed sum flows back to each rank's tokens unchanged.

    Raises ConfigError on shapes that do not match and on a `backend` that cannot run, DataError on an id that is too
    large (on CUDA, which would have to be waited for, the Triton kernel makes every sum NaN instead).
    """
    if normalize not in ("none", "mean"):
        raise ConfigError(f"normalize={normalize!r} is not known: use 'none' or 'mean'")
    if segment_ids.dtype not in INDEX_TYPES or segment_ids.device != logp.device:
        raise ConfigError(
            f"segment_ids are {segment_ids.dtype} on {segment_ids.device}: int64 or int32 on {logp.device} is needed"
        )
    if logp.ndim != 1 or segment_ids.shape != logp.shape:
        raise ConfigError(
            f"logp {list(logp.shape)} and segment_ids {list(segment_ids.shape)} must be 1-d and equally long"
        )
    ids = segment_ids.long()
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= num_segments:
        raise DataError(f"segment_ids holds {int(ids.max())}, but num_segments is {num_segments}")
    group = cp_group if cp_group is not None and cp_group.size() > 1 else None
    mean = normalize == "mean"
    if choose(backend, logp.device, logp.dtype) == "triton":
        from megafuse.kernels._segments_triton import TritonSegmentLogprobs

        sums, counts = TritonSegmentLogprobs.apply(logp, ids, num_segments, mean, group)
    else:
        sums, counts = _SegmentLogprobs.apply(logp, ids, num_segments, mean, group)
    return sums, counts
