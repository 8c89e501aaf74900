"""FlexAttention: one compiled kernel a row that skips the blocks of the mask in which no query sees a key.

Compiled on CUDA, forward and backward. On a CPU torch runs it uncompiled and forward only, which is enough to compare
its mask with that of `sdpa`.

torch compiles a function once for each dtype, width, number of heads and so on, at most 8 times, and then goes on
without compiling: right numbers, and a matrix of all scores. So each of these gets a function of its own, in which only
the length of the row varies (2 or 3 graphs), and the limit is an error.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple
from zlib import crc32

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
    own_positions = positions[places]
    reach = torch.full((), window or 0, device=segment.device)  # a tensor: a number would be compiled in

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = own_segment[query] == segment[key]
        shared = own_parent[query] == segment[key]
        return (places[query] >= key) & (same | shared) & (own_segment[query] >= 0)

    def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (own_positions[query] - positions[key] < reach)

    device = segment.device.type
    seen, make = sees if window is None else sees_near, create_block_mask
    if device == "cuda":
        make = compiled_mask(window is not None)
    return make(seen, None, None, places.numel(), segment.numel(), device=device, BLOCK_SIZE=TILE)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None = None) -> Tensor:
    """q: [1, h, q, d]; k, v: [1, g, t, d] -> [1, h, q, d], zeros where a query sees nothing.

    Raises ValueError on CUDA where q or t is not a multiple of `TILE`.
    """
    if q.device.type == "cuda":
        return attend_compiled(q, k, v, mask, scale, softcap)
    score_mod = None if softcap is None else _capped(softcap)
    return _attend(q, k, v, mask, score_mod, scale)


def attend_compiled(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """`flex_attend` by the function that is compiled for tensors of this kind.

    Raises torch's FailOnRecompileLimitHit rather than going on uncompiled.
    """
    if q.size(2) % TILE or k.size(2) % TILE:
        raise ValueError(f"{q.size(2)} queries and {k.size(2)} keys are not multiples of {TILE}")
    wants = torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad)
    kind = _Kind(mask.mask_mod.__name__, softcap, scale, q.dtype, q.size(1), k.size(1), q.size(3), str(wants))
    # A length that is 128 n by construction: of a symbol alone torch cannot tell, and masks every load.
    tiles = (x.unflatten(2, (-1, TILE)) for x in (q, k, v))
    return _kernel(kind)(*tiles, mask)


class _Kind(NamedTuple):
    """What a compiled function is specialised on, beside the length of the row."""

    mask: str
    softcap: float | None
    scale: float
    dtype: torch.dtype
    heads: int
    groups: int
    width: int
    wants: str  # which of q, k and v have a gradient


@functools.cache
def _kernel(kind: _Kind) -> Callable[..., Tensor]:
    score_mod, scale = None if kind.softcap is None else _capped(kind.softcap), kind.scale

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """Operands [1, heads, tiles, TILE, d]."""
        return _attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), mask, score_mod, scale)

    return compiled(alone(attend, kind))


@functools.cache
def compiled_mask(windowed: bool) -> Callable[..., BlockMask]:
    """`create_block_mask`, compiled for masks with a window or for those without."""
    return compiled(alone(create_block_mask, windowed))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled as a whole: `fullgraph` makes torch's limit on recompilation an error, not a slow way on."""
    return torch.compile(function, fullgraph=True)


def alone(function: Any, kind: Any) -> FunctionType:
    """A copy of `function` for one `kind` of arguments, with code of its own.

    torch counts graphs by code object, which all closures share, and remembers by the code's name which numbers have
    been seen to vary: heads, widths and caps would become symbols once two models had been seen.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{crc32(repr(kind).encode()):08x}")
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, score_mod: Any, scale: float) -> Tensor:
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


@functools.cache  # one function a cap: another would be compiled again
def _capped(softcap: float) -> Any:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
