"""Core attention over packed rows: torch's scaled_dot_product_attention, one call a block of the row.

A row is described by two int32 vectors: `segment[t]` and `parent[t]` (-1 pads). A query sees the keys at or before its
own place that belong to its own segment, and all keys of its parent segment. So a prompt is a segment that is its own
parent, a response that shares it names it as parent, and an unshared sequence is its own parent. Tokens of one parent
stand together (a block): attention never crosses blocks, so the cost is the sum of squares of blocks, not of the row.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


@dataclass(frozen=True)
class Block:
    """Tokens [start, stop) of a row that attend to each other; `mask` [1, 1, l, l] bool, None where plainly causal."""

    start: int
    stop: int
    mask: Tensor | None


def visible(segment: Tensor, parent: Tensor) -> Tensor:
    """Which key each query sees. segment, parent: [t] int -> [t, t] bool (query, key)."""
    order = torch.arange(segment.numel(), device=segment.device)
    causal = order[:, None] >= order[None, :]
    same = segment[:, None] == segment[None, :]
    shared = parent[:, None] == segment[None, :]
    return causal & (same | shared) & (segment >= 0)[:, None]


def row_blocks(layout: Tensor) -> list[Block]:
    """Blocks of a row from its [2, t] int32 layout (segment, parent). Padding at the end belongs to no block."""
    segment, parent = layout.cpu()
    starts = [0, *((parent[1:] != parent[:-1]).nonzero().flatten() + 1).tolist(), parent.numel()]
    blocks = []
    for start, stop in pairwise(starts):
        if start == stop or parent[start] < 0:
            continue
        shared = bool((segment[start:stop] != parent[start:stop]).any())
        piece = layout[:, start:stop]
        blocks.append(Block(start, stop, visible(piece[0], piece[1])[None, None] if shared else None))
    return blocks


class BlockCache:
    """Blocks of the rows in flight, so that a mask is built once a row and not once a layer.

    Keyed by the address of the layout tensor. The entry keeps that tensor alive, so the address cannot be given to
    another row while the entry stands; recomputation in backward sees a detached alias of the same storage.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, tuple[Tensor, list[Block]]] = OrderedDict()

    def get(self, layout: Tensor) -> list[Block]:
        """Blocks of the row that `layout` [2, t] describes."""
        key = layout.data_ptr()
        if key not in self._entries:
            self._entries[key] = (layout, row_blocks(layout))
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return self._entries[key][1]


class RowAttention(MegatronModule):
    """Core attention of one layer. Grouped-query attention, any row layout, forward and backward on CPU and CUDA."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        blocks: BlockCache,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.blocks = blocks
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,  # [t, 1, h, d]
        key: Tensor,  # [t, 1, g, d]
        value: Tensor,  # [t, 1, g, d]
        attention_mask: Tensor,  # [2, t] int32: the row's layout
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend inside each block of the row. Returns [t, 1, h * d]; padding comes out as zeros."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, t, d]
        grouped = q.size(1) != k.size(1)
        outputs, done = [], 0
        for block in self.blocks.get(attention_mask):
            if block.start > done:
                raise ValueError(f"row layout has padding before token {block.start}")
            part = slice(block.start, block.stop)
            outputs.append(
                scaled_dot_product_attention(
                    q[:, :, part],
                    k[:, :, part],
                    v[:, :, part],
                    attn_mask=block.mask,
                    is_causal=block.mask is None,
                    scale=self.scale,
                    enable_gqa=grouped,
                )
            )
            done = block.stop
        # an empty row still has to carry a gradient path to its queries, or pipeline stages would wait for it
        out = torch.cat(outputs, dim=2) if outputs else q[:, :, :0]
        out = pad(out, (0, 0, 0, q.size(2) - done))
        return out.permute(2, 0, 1, 3).reshape(q.size(2), 1, -1)
