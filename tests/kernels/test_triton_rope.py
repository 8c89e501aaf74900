"""Rotary positions, by torch and by Triton, against complex numbers in float64; both backends give the same."""

import math

import pytest
import torch
from torch import Tensor

from megafuse.errors import ConfigError
from megafuse.kernels.rope import rotate_heads

BACKENDS = ["torch", "triton"]


def angles(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ones, over many turns [t, d / 2] float64, and their table [t, 1, 1, d]."""
    angle = (torch.rand(rows, width // 2, dtype=torch.float64) * 9000).float().double()
    table = torch.cat((angle.cos(), angle.sin()), dim=-1).float()[:, None, None]
    return angle, table.to(device)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """x [t, 1, h, d] as d / 2 complex numbers, each times e^(i angle)."""
    first, second = x.double().cpu().chunk(2, dim=-1)
    done = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    return torch.cat((done.real, done.imag), dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (9, 64), (40, 96), (33, 128)])
def test_heads_and_their_gradient(
    backend: str, dtype: torch.dtype, heads: int, width: int, device: torch.device
) -> None:
    """Keys are a part of mcore's product: their rows and heads lie apart. Bound: the table's rounding, and x's."""
    rows = int(torch.randint(1, 9, ()))
    whole = torch.randn(rows, 1, heads, 3 * width).to(device, dtype)
    x = whole[..., width : 2 * width].detach().requires_grad_()
    assert heads == 1 or not x.is_contiguous()
    angle, table = angles(rows, width, device)
    slope = torch.randn(rows, 1, heads, width).to(device, dtype)
    got = rotate_heads(x, table, backend=backend)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == x.shape
    got.backward(slope)
    assert x.grad is not None and x.grad.dtype == dtype
    step = 2.0**-24 if dtype == torch.float32 else 2.0**-8  # half an ulp, of rounding to nearest
    if dtype == torch.bfloat16 and backend == "triton" and device.type == "cpu":
        step *= 2  # the interpreter cuts off
    for found, exact, given in ((got, turned(x, angle), x), (x.grad, turned(slope, -angle), slope)):
        size = given.detach().double().abs().cpu().chunk(2, dim=-1)
        bound = step * exact.abs() + 4 * 2.0**-24 * (size[0] + size[1]).repeat(1, 1, 1, 2)
        assert bool(((found.detach().double().cpu() - exact).abs() <= bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_keeps_lengths_and_depends_on_distance_alone(backend: str, device: torch.device) -> None:
    """What rotary positions are for: q at m times k at n is a function of m - n."""
    table = angles(1, 16, device)[1]
    frequency = torch.rand(8, dtype=torch.float64)

    def at(place: int, x: Tensor) -> Tensor:
        angle = place * frequency
        table = torch.cat((angle.cos(), angle.sin())).float()[None, None, None].to(device)
        return rotate_heads(x, table, backend=backend).double().flatten()

    q, k = torch.randn(2, 1, 1, 1, 16, device=device)
    turned_q = rotate_heads(q, table, backend=backend)
    assert float(turned_q.norm()) == pytest.approx(float(q.norm()), rel=1e-6)
    near, far = (float(at(m, q) @ at(m - 5, k)) for m in (7, 93))
    assert near == pytest.approx(far, rel=1e-5, abs=1e-5)
    assert math.isfinite(near)


def test_corners(device: torch.device) -> None:
    for backend in BACKENDS:
        nothing = torch.zeros(0, 1, 3, 4, device=device, requires_grad=True)
        rotate_heads(nothing, torch.zeros(0, 1, 1, 4, device=device), backend=backend).sum().backward()
        assert nothing.grad is not None and nothing.grad.shape == (0, 1, 3, 4)
    every_other = torch.randn(2, 1, 3, 8, device=device)[..., ::2]
    table = angles(2, 4, device)[1]
    both = [rotate_heads(every_other, table, backend=backend) for backend in BACKENDS]
    assert torch.allclose(both[0], both[1], rtol=0, atol=1e-6)
    wide = torch.randn(2, 1, 3, 4, device=device).double()
    assert rotate_heads(wide, table, backend="torch").dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "table", "said"),
    [
        ((2, 1, 3, 5), torch.zeros(2, 1, 1, 5), "d even"),
        ((2, 2, 3, 4), torch.zeros(2, 1, 1, 4), "must be"),
        ((2, 1, 3, 4), torch.zeros(3, 1, 1, 4), "must be"),
        ((2, 1, 3, 4), torch.zeros(2, 1, 1, 4).bfloat16(), "table is torch.bfloat16"),
    ],
)
def test_what_does_not_match_is_refused(shape: tuple[int, ...], table: Tensor, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rotate_heads(torch.zeros(shape), table)
