"""FlexAttention: one compiled kernel a row that skips the blocks of the mask in which no query sees a key.

Compiled on CUDA, forward and backward. On a CPU torch runs it uncompiled and forward only, which is enough to compare
its mask with that of `sdpa`.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megafuse.model.attention import row_positions

TILE = 128  # places of a mask block; rows are rounded up to it, so that no kernel has a ragged edge


def flex_mask(segment: Tensor, parent: Tensor, places: Tensor, window: int | None = None) -> BlockMask:
    """The row's mask by tiles. segment, parent: [t] int32; places: [q] int64, the places of this rank's queries.

    window: only keys less than this many positions before the query; tiles further back are skipped.
    """
    own_segment, own_parent = segment[places], parent[places]
    positions = row_positions(segment, parent)
    own_positions, reach = positions[places], window or 0

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = own_segment[query] == segment[key]
        shared = own_parent[query] == segment[key]
        return (places[query] >= key) & (same | shared) & (own_segment[query] >= 0)

    def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (own_positions[query] - positions[key] < reach)

    cuda = segment.device.type == "cuda"
    return create_block_mask(
        sees if window is None else sees_near, None, None, places.numel(), segment.numel(),
        device=segment.device.type, BLOCK_SIZE=TILE, _compile=cuda,
    )  # fmt: skip


@functools.cache
def _kernel(device_type: str) -> Any:
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@functools.cache  # one function a cap: another would be compiled again
def _capped(softcap: float) -> Any:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None = None) -> Tensor:
    """q: [1, h, q, d]; k, v: [1, g, t, d] -> [1, h, q, d], zeros where a query sees nothing."""
    kernel, score_mod = _kernel(q.device.type), None if softcap is None else _capped(softcap)
    return kernel(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
