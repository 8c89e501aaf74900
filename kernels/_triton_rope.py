"""Triton kernel of rotary positions: reads each head once, writes it once."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads"])
def turn_heads(
    x: tl.tensor,  # [T, h, 2 HALF] with strides (x_row, x_head, 1)
    table: tl.tensor,  # [T, 2 HALF] float32: cosines, sines
    out: tl.tensor,  # [T, h, 2 HALF] out, contiguous
    x_row: tl.tensor,
    x_head: tl.tensor,
    heads: tl.tensor,
    direction: tl.tensor,  # 1.0: turn, -1.0: turn back
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """One program turns HEADS heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, COLUMNS)
    own = column < HALF
    cos = tl.load(table + row * 2 * HALF + column, mask=own, other=0.0)[None, :]
    sin = tl.load(table + row * 2 * HALF + HALF + column, mask=own, other=0.0)[None, :] * direction
    inside = (head < heads) & own[None, :]
    source = x + row * x_row + head * x_head + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out + (row * heads + head) * 2 * HALF + column[None, :]
    dtype = out.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(dtype), mask=inside)
