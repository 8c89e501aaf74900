"""What the Triton kernels share. Nothing here runs on the host. Import only after `backend.choose` said `triton`.

Annotations are real objects here (no `from __future__ import annotations`): the interpreter compares them, and the
compiler looks them up, so only names that it knows (`tl.tensor`, `tl.constexpr`) will do.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def transform(x: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """`(z, slope)` of raw float32 logits: z = cap * tanh(x / cap) * scale, and tanh's slope (dz/dx over scale)."""
    if CAPPED:
        u = x / cap
        t = 1.0 - 2.0 / (1.0 + tl.exp2(u * (2.0 * LOG2E)))
        # Near 0 that form cancels; the series is exact to float32 below 1/4 (next term 62/2835 u^9).
        s = u * u
        series = u * (1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 - s * 0.05396825396825397)))
        t = tl.where(tl.abs(u) < 0.25, series, t)
        return cap * t * scale, 1.0 - t * t
    else:
        return x * scale, 1.0


@triton.jit
def softplus64(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)) of float64 to full relative precision; Triton has no log1p that its interpreter knows."""
    small = tl.exp(-tl.abs(x))
    one = 1.0 + small
    ratio = small / tl.where(one == 1.0, 1.0, one - 1.0)  # corrects log(one) for what `1 + small` lost
    return tl.maximum(x, 0.0) + tl.where(one == 1.0, small, tl.log(one) * ratio)


@triton.jit
def sigmoid64(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) of float64."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def local_column(target: tl.tensor, start: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Column of a global id in this shard as int32; -1 where another rank owns it."""
    column = target.to(tl.int64) - start
    return tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)
