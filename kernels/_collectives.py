"""The one collective of the forward passes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def gather_ranks(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`t` of every rank, stacked in rank order: `[ranks, *t.shape]`, equal on all ranks. No gradient."""
    flat = t.contiguous().view(-1)
    every = flat.new_empty(group.size() * flat.numel())  # gloo takes the concatenated form only
    dist.all_gather_into_tensor(every, flat, group=group)
    return every.view(group.size(), *t.shape)
