"""FlexAttention: one compiled kernel a row that skips the blocks of the mask in which no query sees a key.

Compiled on CUDA, forward and backward. On a CPU torch runs it uncompiled and forward only, which is enough to compare
its mask with that of `sdpa`.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

TILE = 128  # places of a mask block; rows are rounded up to it, so that no kernel has a ragged edge


def flex_mask(segment: Tensor, parent: Tensor, places: Tensor) -> BlockMask:
    """The row's mask by tiles. segment, parent: [t] int32; places: [q] int64, the places of this rank's queries."""
    own_segment, own_parent = segment[places], parent[places]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = own_segment[query] == segment[key]
        shared = own_parent[query] == segment[key]
        return (places[query] >= key) & (same | shared) & (own_segment[query] >= 0)

    cuda = segment.device.type == "cuda"
    return create_block_mask(
        sees, None, None, places.numel(), segment.numel(), device=segment.device.type, BLOCK_SIZE=TILE, _compile=cuda
    )


@functools.cache
def _kernel(device_type: str) -> Any:
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """q: [1, h, q, d]; k, v: [1, g, t, d] -> [1, h, q, d], zeros where a query sees nothing."""
    kernel = _kernel(q.device.type)
    return kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
