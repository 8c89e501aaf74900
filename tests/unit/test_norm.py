"""RMSNorm: numbers against float64 and against torch's own, and what it keeps for backward."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from megafuse.model.norm import RMSNorm

EPS = 1e-5
FP32, BF16 = torch.float32, torch.bfloat16


def make(hidden: int, dtype: torch.dtype, centred: bool, generator: torch.Generator) -> RMSNorm:
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=centred, use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=False
    )
    norm = RMSNorm(config, hidden, EPS)
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(hidden, generator=generator))
    return norm


def by_torch(x: Tensor, norm: RMSNorm) -> Tensor:
    """torch's rms_norm of an fp32 copy."""
    return rms_norm(x.float(), norm.weight.shape, norm.weight.float() + norm.centre, EPS).to(x.dtype)


def kept(inputs: tuple[Tensor, ...], saved: list[Tensor]) -> int:
    """Bytes of `saved` that are not the inputs'."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    return sum(size for address, size in stores.items() if address not in known)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("centred", [False, True])
def test_bits_of_the_output_and_gradients_as_exact_as_torchs(dtype: torch.dtype, centred: bool) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    for shape, magnitude in (((300, 1, 256), 1.0), ((70, 1, 576), 100.0), ((50, 1, 6, 64), 1e-3)):
        norm = make(shape[-1], dtype, centred, generator)
        x = (magnitude * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        upstream = torch.randn(shape, generator=generator).to(dtype)
        wide = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
        rms_norm(wide[0], wide[1].shape, wide[1] + norm.centre, EPS).backward(upstream.double())
        output, usual = norm(x), by_torch(x, norm)
        assert output.dtype == dtype and torch.equal(output, usual)
        found, known = (torch.autograd.grad(y, (x, norm.weight), upstream) for y in (output, usual))
        for mine, torchs, exact in zip(found, known, (wide[0].grad, wide[1].grad)):
            assert exact is not None and mine.dtype == dtype
            error, bound = (float((g.double() - exact).norm() / exact.norm()) for g in (mine, torchs))
            assert error < 1.05 * bound + 2e-8, "a tenth of a rounding of fp32 is the order of the sums"


@pytest.mark.parametrize(("dtype", "copies"), [(FP32, 1), (BF16, 2)])
def test_only_a_number_for_each_row_is_kept(dtype: torch.dtype, copies: int) -> None:
    """Beside x and the weight, which live anyhow; torch's own keeps `copies` fp32 copies of x more."""
    generator = torch.Generator().manual_seed(0)
    norm, x = make(64, dtype, False, generator), torch.randn(100, 1, 64, generator=generator).to(dtype).requires_grad_()
    inputs = (x, norm.weight)
    for function, expected in ((norm, 100 * 4), (lambda x: by_torch(x, norm), copies * 100 * 64 * 4)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            function(x)
        size = kept(inputs, saved)
        assert size == expected if function is norm else size >= expected
