"""A look at every number of a model or of a checkpoint to be written: is one of them NaN or infinite?"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megafuse.parallel.topology import Topology


def named_tensors(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(canonical name, part that this rank holds) of every tensor of a sharded state dict.

    Where a name is that of all layers (or experts) the number of this one follows, if it is known:
    `decoder.layers.mlp.linear_fc2.weight[3]`.
    """
    found = [value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)]
    return [(value.key + _place(value), value.data) for value in found if value.data is not None]


def _place(value: Any) -> str:
    offset = getattr(value, "global_offset", ())  # a gate and up projection, still one tensor, does not tell
    return "".join(f"[{number}]" for number in offset[: len(offset) - value.data.ndim])


def non_finite(tensors: Iterable[tuple[str, Tensor]], topology: Topology) -> list[str]:
    """Names of the tensors, of any rank, that hold a NaN or an infinity; all ranks get the same list. Collective.

    One pass over the tensors, without a copy of any, and one all-reduce where all is well.
    """
    bad = list(dict.fromkeys(name for name, tensor in tensors if not _is_finite(tensor)))
    if topology.all_agree(not bad):
        return []
    told = topology.gather_on_rank_zero([f"{name} (rank {topology.rank})" for name in bad])
    return topology.from_rank_zero([name for names in told or [] for name in names])


def shortened(names: list[str]) -> str:
    """The first few of the names, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # both are NaN where any number is
    return math.isfinite(float(low)) and math.isfinite(float(high))
