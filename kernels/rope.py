"""Rotary position embedding: queries and keys turned by the angles of their positions, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.errors import ConfigError
from megafuse.kernels.backend import choose


def rotate_heads(x: Tensor, table: Tensor, *, backend: str = "auto") -> Tensor:
    """Turn each pair (i, i + d / 2) of a head's dimensions by the angle that `table` has for its place.

    x: [t, 1, h, d], any strides; table: [t, 1, 1, d] float32, cosines in its first half, sines in its second. Returns
    [t, 1, h, d], contiguous, of x's dtype: computed in float32 (float64 where x is), and rounded once. The gradient is
    the turn back; nothing of x is kept for it. (RoFormer, eq. 34, with the pairs of GPT-NeoX and of Hugging Face.)

    Raises ConfigError on shapes that do not match, an odd d, and on a `backend` that cannot run.
    """
    if x.ndim != 4 or x.size(1) != 1 or x.size(3) % 2 or table.shape != (x.size(0), 1, 1, x.size(3)):
        raise ConfigError(
            f"x {list(x.shape)} and table {list(table.shape)} must be [t, 1, heads, d] and [t, 1, 1, d], d even"
        )
    if table.dtype != torch.float32 or table.device != x.device:
        raise ConfigError(f"table is {table.dtype} on {table.device}: float32 on {x.device} is needed")
    turned: Tensor = _RotateHeads.apply(x, table, choose(backend, x.device, x.dtype) == "triton")
    return turned


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.compiled = compiled
        return _turn(x, table, 1.0, compiled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _turn(grad, table, -1.0, ctx.compiled), None, None


def _turn(x: Tensor, table: Tensor, direction: float, compiled: bool) -> Tensor:
    """`direction` 1 turns, -1 turns back."""
    if compiled:
        from megafuse.kernels._rope_triton import turn

        return turn(x, table, direction)
    cos, sin = table.chunk(2, dim=-1)
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    sin = direction * sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
