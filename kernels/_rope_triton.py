"""The launch of the rotary kernel. Import only after `backend.choose` said `triton`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megafuse.kernels._triton_rope import turn_heads
from megafuse.kernels.backend import on_device

_PAIRS = 1024  # of a program: 8 a thread


def turn(x: Tensor, table: Tensor, direction: float) -> Tensor:
    """x [t, 1, h, d] turned (direction 1) or turned back (-1) by `table` [t, 1, 1, d] float32; contiguous."""
    x = x if x.stride(3) == 1 else x.contiguous()
    rows, _, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        columns = triton.next_power_of_2(width // 2)
        together = min(triton.next_power_of_2(heads), max(1, _PAIRS // columns))
        with on_device(x):
            turn_heads[(rows, -(-heads // together))](
                *(x, table.contiguous(), out, x.stride(0), x.stride(2), heads, direction),
                HALF=width // 2, COLUMNS=columns, HEADS=together, num_warps=4,
            )  # fmt: skip
    return out
