"""Triton kernels over logits [T, V_local] that exist: one read forward, one read and one write backward.

Of a row, over this rank's columns except the target's: m = max z_j, s = sum exp(z_j - m). Then, as in
`_vocab_softmax`, x = (m - z_y) + log s, log p = -softplus(x), 1 - p = sigmoid(x). No atomics: the same bits every run.
"""

import triton
import triton.language as tl

from megafuse.kernels._triton_math import LOG2E, local_column, sigmoid64, softplus64, transform


@triton.jit(do_not_specialize=["rows"])
def row_stats(
    logits: tl.tensor,  # [T, V] float32 or bfloat16
    stride: tl.tensor,
    targets: tl.tensor,  # [T] integer, global ids
    stats: tl.tensor,  # [3, T] float32 out: m, s, z_y (-inf where not owned)
    rows: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row; online maximum a block, online sum a lane."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    y = local_column(tl.load(targets + row), start, columns)
    m = -float("inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < columns
        z, _ = transform(tl.load(base + j, mask=inside, other=0.0).to(tl.float32), scale, cap, CAPPED)
        z = tl.where(inside & (j != y), z, -float("inf"))
        new = tl.maximum(m, tl.max(z, 0))
        anchor = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2((m - anchor) * LOG2E) + tl.exp2((z - anchor) * LOG2E)
        m = new
    target = -float("inf")
    if y >= 0:
        target, _ = transform(tl.load(base + y).to(tl.float32), scale, cap, CAPPED)
    tl.store(stats + row, m)
    tl.store(stats + rows + row, tl.sum(total, 0))
    tl.store(stats + 2 * rows + row, target)


@triton.jit(do_not_specialize=["rows"])
def finish_rows(
    parts: tl.tensor,  # [W, 3, T] float32: every rank's `stats`
    ranks: tl.tensor,
    logp: tl.tensor,  # [T] float32 out
    saved: tl.tensor,  # [3, T] float32 out, for `row_gradient`: M = max over ranks, (1 - p) / s, 1 - p
    rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Merge the ranks' statistics in rank order, in float64; log p and what backward needs."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < rows
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    target = tl.full((BLOCK,), -float("inf"), tl.float32)
    for rank in range(0, ranks):
        part = parts + rank * 3 * rows + i
        largest = tl.maximum(largest, tl.load(part, mask=ok, other=0.0))
        target = tl.maximum(target, tl.load(part + 2 * rows, mask=ok, other=0.0))
    anchor = tl.where(largest == -float("inf"), 0.0, largest).to(tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        part = parts + rank * 3 * rows + i
        m = tl.load(part, mask=ok, other=0.0).to(tl.float64)
        others += tl.load(part + rows, mask=ok, other=1.0).to(tl.float64) * tl.exp(m - anchor)
    x = (anchor - target.to(tl.float64)) + tl.log(others)
    tl.store(logp + i, (-softplus64(x)).to(tl.float32), mask=ok)
    tl.store(saved + i, largest, mask=ok)
    tl.store(saved + rows + i, (1.0 / (others + tl.exp(target.to(tl.float64) - anchor))).to(tl.float32), mask=ok)
    tl.store(saved + 2 * rows + i, sigmoid64(x).to(tl.float32), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def row_gradient(
    logits: tl.tensor,  # [T, V]
    stride: tl.tensor,
    out: tl.tensor,  # [T, V]: d loss / d logits; may be `logits`
    out_stride: tl.tensor,
    targets: tl.tensor,
    saved: tl.tensor,  # [3, T] float32 of `finish_rows`
    grad: tl.tensor,  # [T] float32: d loss / d log p
    rows: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of a row. At the target g * (1 - p), elsewhere -g * p_j; padding gets 0.

    A row with g = 0 is written without being read: masked tokens cost half, and a NaN among them goes nowhere.
    """
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    y = local_column(tl.load(targets + row), start, columns)
    g = tl.load(grad + row).to(tl.float32) * scale
    read = j < tl.where(g == 0.0, 0, columns)
    x = tl.load(logits + row * stride + j, mask=read, other=0.0).to(tl.float32)
    z, slope = transform(x, scale, cap, CAPPED)
    others = -g * tl.load(saved + rows + row) * tl.exp2((z - tl.load(saved + row)) * LOG2E)
    dz = tl.where(j == y, g * tl.load(saved + 2 * rows + row), others) * slope
    dz = tl.where(read, dz, 0.0)
    tl.store(out + row * out_stride + j, dz.to(out.dtype.element_ty), mask=j < width)
