"""Small Triton kernels around the two kinds of matrix products of the linear log-probs; O(T) or O(T x H) each.

Of target i with anchor a_i, over this rank's columns but the target's: S_i = sum_j E_ij (see `_triton_gemm`). With
A = max over ranks of a, R = sum over ranks of 2^40 S exp(a - A) and t = z_y - A:

    x = log R - t      log p = -softplus(x)      1 - p = sigmoid(x) = R / (R + exp t)
    d (g log p) / d logit_j = -(g / temperature) f E_ij slope_j,   f = 2^40 exp(a - A) / (R + exp t)

and at the target it is +(g / temperature) (1 - p) slope_y: an entry P = -(1 - p) / f * slope_y of E makes it so. E does
not know g: the coefficient of any loss enters as one factor a row, -g f / temperature, after the matrix is written.
"""

import triton
import triton.language as tl

from megafuse.kernels._triton_math import local_column, sigmoid64, softplus64, transform

# Sums above this are done again with another anchor, and P is kept below: f and g f stay normal float32 numbers.
MARK_ABOVE: tl.constexpr = tl.constexpr(2.0**70)
LARGEST_PATCH: tl.constexpr = tl.constexpr(2.0**90)
SHIFT: tl.constexpr = tl.constexpr(2.0**40)


@triton.jit
def target_logits(
    hidden: tl.tensor,  # [T_h, H]
    hidden_stride: tl.tensor,
    weight: tl.tensor,  # [V, H]
    weight_stride: tl.tensor,
    index: tl.tensor,  # [T] int64: row of `hidden` of each target
    targets: tl.tensor,
    x: tl.tensor,  # [T, H] out: the gathered rows, with INDEXED
    z: tl.tensor,  # [T] float32 out: z_y, -inf where another rank has the target
    width: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    INDEXED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The target's own logit as a float32 dot product, on the way of gathering its hidden row."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(index + i).to(tl.int64) if INDEXED else i
    y = local_column(tl.load(targets + i), start, columns)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        k = first + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * hidden_stride + k, mask=k < width, other=0.0)
        if INDEXED:
            tl.store(x + i * width + k, h, mask=k < width)
        w_at = weight + tl.maximum(y, 0).to(tl.int64) * weight_stride + k
        w = tl.load(w_at, mask=k < tl.where(y >= 0, width, 0), other=0.0)
        total += h.to(tl.float32) * w.to(tl.float32)
    own, _ = transform(tl.sum(total, 0), scale, cap, CAPPED)
    tl.store(z + i, tl.where(y >= 0, own, -float("inf")))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["sums", "spread"])
def sum_tiles(
    parts: tl.tensor,  # [tiles, R] float32
    spreads: tl.tensor,
    sums: tl.tensor,  # [R] float32 out
    spread: tl.tensor,  # [R] float32 out, with ENTROPY
    marked: tl.tensor,  # [R] int32 out: 1 where the sum is too large or no number, with MARK
    flag: tl.tensor,  # [1] int32: becomes 1 if any is
    tiles: tl.tensor,
    rows: tl.tensor,
    ENTROPY: tl.constexpr,
    MARK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums over the column tiles, in order, in float64."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < rows
    total = tl.zeros((BLOCK,), tl.float64)
    wide = tl.zeros((BLOCK,), tl.float64)
    for tile in range(0, tiles):
        at = tile * rows + i
        total += tl.load(parts + at, mask=ok, other=0.0).to(tl.float64)
        if ENTROPY:
            wide += tl.load(spreads + at, mask=ok, other=0.0).to(tl.float64)
    tl.store(sums + i, total.to(tl.float32), mask=ok)
    if ENTROPY:
        tl.store(spread + i, wide.to(tl.float32), mask=ok)
    if MARK:
        bad = tl.where(total <= MARK_ABOVE, 0, 1)  # NaN is bad too
        tl.store(marked + i, bad, mask=ok)
        worst = tl.max(tl.where(ok, bad, 0), 0)
        if worst > 0:
            tl.atomic_max(flag, worst)  # of integers: the order does not matter


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["anchors"])
def move_anchors(
    maxima: tl.tensor,  # [tiles, R] float32, valid where marked
    marked: tl.tensor,
    flag: tl.tensor,
    anchors: tl.tensor,  # [R] float32, in place
    tiles: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Marked rows are anchored at their largest logit instead of the target's."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    again = tl.load(marked + i, mask=i < rows, other=0) > 0
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for tile in range(0, tiles * tl.load(flag)):
        largest = tl.maximum(largest, tl.load(maxima + tile * rows + i, mask=again, other=-float("inf")))
    tl.store(anchors + i, largest, mask=again)


@triton.jit(do_not_specialize=["rows"])
def finish_targets(
    parts: tl.tensor,  # [W, 2 or 3, T] float32: every rank's a, S (and sum of E (z - a), with ENTROPY)
    ranks: tl.tensor,
    anchors: tl.tensor,  # [T] float32: this rank's a
    z: tl.tensor,  # [T] float32: z_y, the same on all ranks
    logp: tl.tensor,  # [T] float32 out
    entropy: tl.tensor,  # [T] float32 out
    saved: tl.tensor,  # [2, T] float32 out: f and P
    rows: tl.tensor,
    slope_scale: tl.tensor,  # temperature / softcap
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Merge the ranks in rank order, in float64."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < rows
    kinds: tl.constexpr = 3 if ENTROPY else 2
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for rank in range(0, ranks):
        largest = tl.maximum(largest, tl.load(parts + rank * kinds * rows + i, mask=ok, other=0.0))
    highest = largest.to(tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    wide = tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        part = parts + rank * kinds * rows + i
        gap = tl.load(part, mask=ok, other=0.0).to(tl.float64) - highest
        mass = tl.load(part + rows, mask=ok, other=0.0).to(tl.float64) * SHIFT
        others += mass * tl.exp(gap)
        if ENTROPY:
            spread = tl.load(part + 2 * rows, mask=ok, other=0.0).to(tl.float64) * SHIFT
            wide += (spread + tl.where(mass > 0.0, gap * mass, 0.0)) * tl.exp(gap)
    target = tl.load(z + i, mask=ok, other=0.0).to(tl.float64)
    t = target - highest
    own = tl.exp(t)
    x = tl.log(others) - t
    tl.store(logp + i, (-softplus64(x)).to(tl.float32), mask=ok)
    if ENTROPY:
        total = others + own
        mean = (wide + tl.where(own > 0.0, own * t, 0.0)) / total
        tl.store(entropy + i, (tl.log(total) - mean).to(tl.float32), mask=ok)
    back = tl.load(anchors + i, mask=ok, other=0.0).to(tl.float64) - highest
    factor = SHIFT * tl.exp(back) / (others + own)
    patch = others * tl.exp(-back) / SHIFT
    # Another rank's logits dwarf all of this rank's: they vanish beside the target's entry, as they should.
    dwarfed = patch > LARGEST_PATCH
    factor = tl.where(dwarfed, sigmoid64(x) / LARGEST_PATCH, factor)
    patch = tl.minimum(patch, LARGEST_PATCH)
    if CAPPED:
        bend = target * slope_scale
        patch = patch * (1.0 - bend * bend)
    tl.store(saved + i, factor.to(tl.float32), mask=ok)
    tl.store(saved + rows + i, (-patch).to(tl.float32), mask=ok)


@triton.jit(do_not_specialize_on_alignment=["v", "targets", "grad", "factor", "patch"])
def bind_gradient(
    e: tl.tensor,  # [R, V] in place: the target's entry becomes P
    e_stride: tl.tensor,
    x: tl.tensor,  # [R, H]
    scaled: tl.tensor,  # [R, H] out: v x, with SCALED
    v: tl.tensor,  # [R] float32 out: -g f / temperature
    targets: tl.tensor,
    grad: tl.tensor,  # [R]: d loss / d log p
    factor: tl.tensor,  # [R] float32: f
    patch: tl.tensor,  # [R] float32: P
    width: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    scale: tl.tensor,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The loss's coefficients arrive: one factor a row. Rows with g = 0 are 0 whatever their hidden state holds."""
    i = tl.program_id(0).to(tl.int64)
    y = local_column(tl.load(targets + i), start, columns)
    if y >= 0:
        tl.store(e + i * e_stride + y, tl.load(patch + i).to(e.dtype.element_ty))
    g = tl.load(grad + i).to(tl.float32)
    value = tl.where(g == 0.0, 0.0, -g * tl.load(factor + i) * scale)
    tl.store(v + i, value)
    if SCALED:
        for first in range(0, width, BLOCK):
            k = first + tl.arange(0, BLOCK)
            h = tl.load(x + i * width + k, mask=k < tl.where(g == 0.0, 0, width), other=0.0).to(tl.float32)
            tl.store(scaled + i * width + k, (value * h).to(scaled.dtype.element_ty), mask=k < width)


@triton.jit
def fold_rows(
    product: tl.tensor,  # [T, H]: E W
    v: tl.tensor,  # [T] float32
    order: tl.tensor,  # [T] int64: targets, those of a row one after the other
    ends: tl.tensor,  # [U] int64: where each row's targets end in `order`
    out: tl.tensor,  # [U, H]: d loss / d hidden of each distinct row
    width: tl.tensor,
    REPEATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[u] = sum of v_i product[i] over the targets of row u, in their order."""
    u = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if REPEATED:
        at = tl.load(ends + u - 1, mask=u > 0, other=0)
        end = tl.load(ends + u)
        while at < end:
            i = tl.load(order + at)
            factor = tl.load(v + i)
            row = tl.load(product + i * width + k, mask=k < tl.where(factor == 0.0, 0, width), other=0.0)
            total += factor * row.to(tl.float32)
            at += 1
    else:
        factor = tl.load(v + u)
        row = tl.load(product + u * width + k, mask=k < tl.where(factor == 0.0, 0, width), other=0.0)
        total = factor * row.to(tl.float32)
    tl.store(out + u * width + k, total.to(out.dtype.element_ty), mask=k < width)
