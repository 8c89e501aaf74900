"""The matrix product whose epilogue is the softmax: no logits in memory, no row kernel, no atomics.

E_ij = 2^((z_ij - a_i) log2(e) - 40) with a_i the target's own logit z_iy. Nothing needs the maximum of the row, so a
tile is finished when its product is; bfloat16 has float32's exponents, and 2^-40 leaves room for z_ij - z_iy from -59
to +76 nats. Rows beyond that are marked and done again by the same kernel with a_i = max_j z_ij (`GUARDED`: it leaves
at once where nothing is marked, so the host need not ask). The target's column is left out (E = 0) and patched later.
"""

import triton
import triton.language as tl

from megafuse.kernels._triton_math import LOG2E, local_column, transform


@triton.jit
def _place(tile: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """(row tile, column tile): GROUP row tiles share each column tile of the weight while it is in the L2 cache."""
    band = tile // (GROUP * tiles_n)
    first = band * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """x[row : row + BM] @ weight[column : column + BN]^T in float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    if not TMA:
        rm = row + tl.arange(0, BM)
        rn = column + tl.arange(0, BN)
        rk = tl.arange(0, BK)
        x_at = x + rm.to(tl.int64)[:, None] * x_stride + rk[None, :]
        w_at = weight + rn.to(tl.int64)[:, None] * weight_stride + rk[None, :]
    for k in range(0, WIDTH, BK):
        if TMA:
            a = x.load([row, k])
            b = weight.load([column, k])
        else:
            inside = (k + rk < WIDTH)[None, :]
            a = tl.load(x_at + k, mask=(rm < rows)[:, None] & inside, other=0.0)
            b = tl.load(w_at + k, mask=(rn < columns)[:, None] & inside, other=0.0)
        if UPCAST:  # the interpreter's bfloat16 product is garbage
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _exponents(
    acc: tl.tensor,  # [BM, BN] raw logits
    rn: tl.tensor,  # [BN] columns
    y: tl.tensor,  # [BM] the target's column, -1 where another rank has it
    anchor: tl.tensor,  # [BM]
    columns: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> tl.tensor:
    """(E times tanh's slope, row sums of E, row sums of E (z - a)) of a slice of a tile."""
    z, slope = transform(acc, scale, cap, CAPPED)
    gap = z - anchor[:, None]
    e = tl.exp2(gap * LOG2E - 40.0)
    e = tl.where((rn[None, :] != y[:, None]) & (rn < columns)[None, :], e, 0.0)
    spread = tl.sum(tl.where(e > 0.0, e * gap, 0.0), 1) if ENTROPY else anchor
    return e * slope, tl.sum(e, 1), spread


@triton.jit
def _write(
    e: tl.tensor,
    tile: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    e_stride: tl.tensor,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Store a slice of E."""
    if TMA:
        e.store([row, column], tile.to(e.dtype))
    else:
        rm = row + tl.arange(0, BM)
        rn = column + tl.arange(0, BN)
        at = e + rm.to(tl.int64)[:, None] * e_stride + rn[None, :]
        tl.store(at, tile.to(e.dtype.element_ty), mask=(rm < rows)[:, None] & (rn < columns)[None, :])


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets", "anchors"])
def exp_product(
    x: tl.tensor,  # [R, H]; a tensor descriptor with TMA
    weight: tl.tensor,  # [V, H]
    e: tl.tensor,  # [R, V] out
    targets: tl.tensor,  # [R] integer, global ids
    anchors: tl.tensor,  # [R] float32: a
    parts: tl.tensor,  # [V / BN, R] float32 out: sums of E over a tile's columns; with MAXIMUM the largest z
    spreads: tl.tensor,  # the same for E (z - a)
    marked: tl.tensor,  # [R] int32: rows to do again
    flag: tl.tensor,  # [1] int32: whether any is
    rows: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    e_stride: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MAXIMUM: tl.constexpr,
    GUARDED: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Persistent: each program takes every PROGRAMS-th tile. K runs in one order, so log-probs do not depend on T.

    What changes from row to row (`rows`, where its slices begin) is not compiled in: one build serves every length.
    """
    tiles_m = tl.cdiv(rows, BM)
    tiles_n = tl.cdiv(columns, BN)
    total = tiles_m * tiles_n
    if GUARDED:
        total = total * tl.load(flag)
    for tile in tl.range(tl.program_id(0), total, PROGRAMS, flatten=not GUARDED):
        pm, pn = _place(tile, tiles_m, tiles_n, GROUP)
        row = pm * BM
        column = pn * BN
        rm = row + tl.arange(0, BM)
        live = rm < rows
        wanted = True
        if GUARDED:
            wanted = tl.max(tl.load(marked + rm, mask=live, other=0), 0) > 0
        if wanted:
            acc = _product(
                x, weight, row, column, rows, columns, x_stride, weight_stride, WIDTH, TMA, UPCAST, BM, BN, BK
            )
            y = local_column(tl.load(targets + rm, mask=live, other=-1), start, columns)
            place = parts + pn.to(tl.int64) * rows + rm
            if MAXIMUM:
                rn = column + tl.arange(0, BN)
                z, _ = transform(acc, scale, cap, CAPPED)
                z = tl.where((rn[None, :] != y[:, None]) & (rn < columns)[None, :], z, -float("inf"))
                tl.store(place, tl.max(z, 1), mask=live)
            else:
                anchor = tl.load(anchors + rm, mask=live, other=0.0)
                # Two halves: a whole tile of temporaries beside the accumulator does not fit the registers.
                HALF: tl.constexpr = BN // 2
                left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
                rn = column + tl.arange(0, HALF)
                slice_, total_left, spread_left = _exponents(left, rn, y, anchor, columns, scale, cap, CAPPED, ENTROPY)
                if STORE:
                    _write(e, slice_, row, column, rows, columns, e_stride, TMA, BM, HALF)
                slice_, total_right, spread_right = _exponents(
                    right, rn + HALF, y, anchor, columns, scale, cap, CAPPED, ENTROPY
                )
                if STORE:
                    _write(e, slice_, row, column + HALF, rows, columns, e_stride, TMA, BM, HALF)
                tl.store(place, total_left + total_right, mask=live)
                if ENTROPY:
                    tl.store(spreads + pn.to(tl.int64) * rows + rm, spread_left + spread_right, mask=live)
