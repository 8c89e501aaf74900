"""Triton kernels of the sums per response: one program a segment scans all ids in order, so nothing is ever atomic."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "segments"])
def segment_sum(
    logp: tl.tensor,  # [T] float
    ids: tl.tensor,  # [T] integer; negative: ignored
    tokens: tl.tensor,
    segments: tl.tensor,
    part: tl.tensor,  # [2, N] float64 out: sum, count
    BLOCK: tl.constexpr,
) -> None:
    """Float64 sums by lane, lanes added in a fixed tree. An id that is too large makes every sum NaN."""
    segment = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, tokens, BLOCK):
        j = (first + tl.arange(0, BLOCK)).to(tl.int64)
        key = tl.load(ids + j, mask=j < tokens, other=-1)
        own = key == segment
        value = tl.load(logp + j, mask=own, other=0.0).to(tl.float64)
        total += tl.where(key >= segments, float("nan"), value)
        count += own.to(tl.int32)
    tl.store(part + segment, tl.sum(total, 0))
    tl.store(part + segments + segment, tl.sum(count, 0).to(tl.float64))


@triton.jit(do_not_specialize=["segments"])
def finish_segments(
    parts: tl.tensor,  # [W, 2, N] float64: every rank's `part`
    ranks: tl.tensor,
    segments: tl.tensor,
    sums: tl.tensor,  # [N] float32 out
    counts: tl.tensor,  # [N] int64 out
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the ranks' parts in rank order, divide by the count where asked, round once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < segments
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        part = parts + rank * 2 * segments + i
        total += tl.load(part, mask=ok, other=0.0)
        count += tl.load(part + segments, mask=ok, other=0.0)
    if MEAN:
        total = total / tl.maximum(count, 1.0)
    tl.store(sums + i, total.to(tl.float32), mask=ok)
    tl.store(counts + i, count.to(tl.int64), mask=ok)


@triton.jit(do_not_specialize=["tokens", "segments"])
def segment_gradient(
    ids: tl.tensor,
    grad: tl.tensor,  # [N] float32: d loss / d sum or mean
    counts: tl.tensor,  # [N] int64
    out: tl.tensor,  # [T]: d loss / d log p; 0 where the id is negative
    tokens: tl.tensor,
    segments: tl.tensor,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each token reads its segment's gradient."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(ids + j, mask=j < tokens, other=-1)
    own = (key >= 0) & (key < segments)
    value = tl.load(grad + key, mask=own, other=0.0).to(tl.float64)
    if MEAN:
        value = value / tl.load(counts + key, mask=own, other=1).to(tl.float64)
    tl.store(out + j, value.to(out.dtype.element_ty), mask=j < tokens)
