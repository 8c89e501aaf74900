"""Core attention over packed rows, with whatever structure the row names.

A row is described by int32 vectors over its places: `segment` and `parent` (-1 pads), and under context parallelism
`owner`, the rank that computes the place. A query sees the keys at or before its own place that belong to its own
segment, and all keys of its parent segment. So a prompt is a segment that is its own parent, a response that shares it
names it as parent, and an unshared sequence is its own parent. Tokens of one parent stand together, the prompt first:
attention never crosses groups, so the cost is the sum over groups, not the square of the row.

Some models look back over a window only, and some cap their scores. A window counts positions, not places: a response
continues its prompt wherever in the row it stands.

Context parallelism gathers keys and values of the whole row; each rank computes the queries that it owns. Two kernels
give the same numbers: `sdpa` here, several calls a row, and `flex` in `megafuse.model.flex`.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch


@dataclass(frozen=True)
class Block:
    """One call: this rank's queries [first, last), counted over its own places, and the keys of the row in `spans`.

    `mask` [1, 1, queries, keys] bool, None where plainly causal.
    """

    spans: tuple[tuple[int, int], ...]
    first: int
    last: int
    mask: Tensor | None

    def keys(self, x: Tensor) -> Tensor:
        """Those keys (or values) of a row. [1, g, t, d] -> [1, g, keys, d]"""
        parts = [x[:, :, start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True)
class RowView:
    """What a rank needs to know of a row: the kernel's `mask`, and where its places and the gathered keys belong."""

    mask: Any
    restore: Tensor | None  # [t] int64: gathered[restore] is in the order of the row; None without context parallelism


Mask = Callable[..., Any]  # (segment [t], parent [t], places [q] int64, window or None) -> the kernel's mask
Attend = Callable[..., Tensor]  # (q [1, h, q, d], k, v [1, g, t, d], mask, scale, cap) -> [1, h, q, d], 0 at padding


def row_positions(segment: Tensor, parent: Tensor) -> Tensor:
    """The position of every place: counted in its segment, a response's from the end of its prompt.

    segment, parent: [t] int -> [t] int64; at padding, anything.
    """
    order = torch.arange(segment.numel(), device=segment.device)
    start = _run_starts(segment, order)
    block = _run_starts(parent, order)  # where the prompt stands
    prompt = torch.zeros_like(order).scatter_add_(0, block, (segment == parent).long())
    return order - start + torch.where(segment == parent, 0, prompt[block])


def _run_starts(ids: Tensor, order: Tensor) -> Tensor:
    """Where the run of equal ids that each place stands in begins. [t] -> [t] int64"""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    return torch.where(begins, order, 0).cummax(0).values


def visible(
    segment: Tensor,
    parent: Tensor,
    places: Tensor | None = None,
    window: int | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Which key each query sees. segment, parent: [t] int; places: [q], keys: [k] (None: all) -> [q, k] bool.

    window: only keys less than this many positions before the query.
    """
    order = torch.arange(segment.numel(), device=segment.device)
    places, keys = (order if chosen is None else chosen for chosen in (places, keys))
    causal = places[:, None] >= keys[None, :]
    same = segment[places, None] == segment[None, keys]
    shared = parent[places, None] == segment[None, keys]
    seen = causal & (same | shared) & (segment[places] >= 0)[:, None]
    if window is None:
        return seen
    positions = row_positions(segment, parent)
    return seen & (positions[places, None] - positions[None, keys] < window)


DENSE = 64  # places of a group up to which one call over all of it costs less than one for each response


def sdpa_blocks(segment: Tensor, parent: Tensor, places: Tensor, window: int | None = None) -> list[Block]:
    """The calls that serve the queries of `places` (rising). Padding at the end belongs to none.

    A group that shares its prompt would waste most of a dense mask on what one response does not see of another: above
    64 places each response is a call of its own, over its prompt and itself.

    Raises ValueError where padding stands before a group.
    """
    seg, par, own = segment.cpu(), parent.cpu(), places.cpu()
    blocks = []
    for start, stop in _runs(par):
        if par[start] < 0:
            continue
        if int((par[:start] < 0).sum()):
            raise ValueError(f"row layout has padding before token {start}")
        parts: list[tuple[tuple[int, int], ...]] = [((start, stop),)]
        if bool((seg[start:stop] != par[start:stop]).any()) and stop - start > DENSE:
            prompt, *responses = ((start + a, start + b) for a, b in _runs(seg[start:stop]))
            parts = [(prompt,), *((prompt, response) for response in responses)]
        for spans in parts:
            first, last = torch.searchsorted(own, torch.tensor(spans[-1])).tolist()
            if first == last:
                continue
            keys = torch.cat([torch.arange(*span, device=segment.device) for span in spans])
            narrow = window is not None and keys.numel() > window
            plain = last - first == keys.numel() and bool((seg[spans[0][0] : spans[0][1]] == seg[spans[0][0]]).all())
            mask = None
            if not plain or narrow:
                mask = visible(segment, parent, places[first:last], window if narrow else None, keys)[None, None]
            blocks.append(Block(spans, first, last, mask))
    return blocks


def _runs(ids: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of each run of equal ids. ids: [t] on the host"""
    cuts = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
    return list(pairwise([0, *cuts.tolist(), ids.numel()])) if ids.numel() else []


def sdpa_attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float, softcap: float | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention, call by call; it knows no cap, so capped scores are written out."""
    outputs = []
    for block in blocks:
        queries = q[:, :, block.first : block.last]
        keys, values = block.keys(k), block.keys(v)
        if softcap is not None:
            outputs.append(capped_attention(queries, keys, values, block.mask, scale, softcap))
            continue
        gqa = q.size(1) != k.size(1)
        outputs.append(
            scaled_dot_product_attention(
                queries, keys, values, attn_mask=block.mask, is_causal=block.mask is None, scale=scale, enable_gqa=gqa
            )
        )
    # a row without queries still has to carry a gradient path, or the other ranks would wait for its share of it
    out = torch.cat(outputs, dim=2) if outputs else q[:, :, :0] + k[:, :1, :0].sum() + v[:, :1, :0].sum()
    return pad(out, (0, 0, 0, q.size(2) - out.size(2)))


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softmax(c * tanh(q k scale / c)) v, both functions in fp32. q: [1, h, q, d]; k, v: [1, g, t, d] -> [1, h, q, d].

    mask: [1, 1, q, t] bool, None for causal (q = t). Every query must see a key.
    """
    heads, groups = q.size(1), k.size(1)
    grouped = q.unflatten(1, (groups, heads // groups))  # [1, g, h / g, q, d]
    scores = softcap * torch.tanh((grouped @ k[:, :, None].transpose(-1, -2)).float() * (scale / softcap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
    weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).to(q.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)


class RowCache:
    """Views of the rows in flight, so that a mask is built once a row (and window) and not once a layer.

    Keyed by the address of the layout tensor. The entry keeps that tensor alive, so the address cannot be given to
    another row while the entry stands; recomputation in backward sees a detached alias of the same storage.
    """

    def __init__(self, mask: Mask, capacity: int = 64) -> None:
        self._mask, self._capacity = mask, capacity
        self._entries: OrderedDict[tuple[int, int | None], tuple[Tensor, RowView]] = OrderedDict()

    def get(self, layout: Tensor, rank: int, window: int | None = None) -> RowView:
        """The view that context-parallel `rank` has of the row described by `layout` [2 or 3, t], through a window."""
        key = layout.data_ptr(), window
        if key not in self._entries:
            self._entries[key] = (layout, self._view(layout, rank, window))
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return self._entries[key][1]

    def _view(self, layout: Tensor, rank: int, window: int | None) -> RowView:
        segment, parent = layout[0], layout[1]
        if layout.size(0) == 2:
            places = torch.arange(segment.numel(), device=layout.device)
            return RowView(self._mask(segment, parent, places, window), None)
        dealt = torch.argsort(layout[2], stable=True)  # ranks hand in their places one after the other
        places = (layout[2] == rank).nonzero().flatten()
        return RowView(self._mask(segment, parent, places, window), torch.argsort(dealt))


def core_attention(name: str, arch: ModelArch) -> Any | None:
    """Core attention whose row cache all layers of a chunk share; None for Transformer Engine's own.

    name: `sdpa`, `flex` or `te`. Raises ConfigError where Transformer Engine's cannot compute what `arch` is.
    """
    if name == "te":
        if arch.attention_softcap or arch.window:
            raise ConfigError(
                f"model.attention = 'te' knows neither the window nor the softcap of {arch.architecture}; use 'auto'"
            )
        return None
    ours = functools.partial(RowAttention, softcap=arch.attention_softcap, window_of=arch.window_of)
    if name == "flex":
        from megafuse.model.flex import flex_attend, flex_mask

        return functools.partial(ours, rows=RowCache(flex_mask), attend=flex_attend)
    return functools.partial(ours, rows=RowCache(sdpa_blocks), attend=sdpa_attend)


class RowAttention(MegatronModule):
    """Core attention of one layer. Grouped-query attention, any row layout, forward and backward on CPU and CUDA."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        rows: RowCache,
        attend: Attend,
        softcap: float | None = None,
        window_of: Callable[[int], int | None] = lambda layer: None,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.rows, self.attend = rows, attend
        self.softcap, self.window = softcap, window_of(layer_number - 1)  # mcore counts layers from 1
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp = getattr(pg_collection, "cp", None)

    def forward(
        self,
        query: Tensor,  # [t / cp, 1, h, d]
        key: Tensor,  # [t / cp, 1, g, d]
        value: Tensor,  # [t / cp, 1, g, d]
        attention_mask: Tensor,  # [2, t] or, with owners, [3, t] int32: the row's layout
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend as the row says. Returns [t / cp, 1, h * d]; padding comes out as zeros."""
        parallel = attention_mask.size(0) == 3
        rank = self.cp.rank() if parallel and self.cp is not None else 0
        view = self.rows.get(attention_mask, rank, self.window)
        if view.restore is not None:
            both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self.cp)
            key, value = both[view.restore].chunk(2, dim=-1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, t, d]
        out = self.attend(q, k, v, view.mask, self.scale, self.softcap)
        return out.permute(2, 0, 1, 3).reshape(q.size(2), 1, -1)
