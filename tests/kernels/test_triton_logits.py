"""The Triton kernels on logits against float64, on fresh random inputs: interpreted on a CPU, compiled on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megafuse.errors import ConfigError
from megafuse.kernels.logprob import vocab_parallel_logprobs
from megafuse.testing.kernel_oracle import ULP_BF16, exact_logprobs, poisoned_memory, worst

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.5},
    {"temperature": 1.6, "softcap": 30.0, "vocab_size": 131},
    {"vocab_size": 131},
]


def run(x: Tensor, targets: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(log-probs, gradient of the logits); a copy is worked on, so that an in-place backward leaves `x` alone."""
    leaf = x.clone().requires_grad_()
    logp = vocab_parallel_logprobs(leaf * 1, targets, backend="triton", **options)
    logp.backward(grad)
    assert leaf.grad is not None
    return logp.detach(), leaf.grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient(dtype: torch.dtype, inplace: bool, options: dict[str, Any], device: torch.device) -> None:
    x = (torch.randn(13, 150, device=device) * 3).to(dtype)
    targets = torch.randint(131, (13,), device=device)
    targets[:2] = torch.tensor([0, 130])  # first and last column of the true vocabulary
    grad = torch.randn(13, device=device)
    with poisoned_memory():
        logp, dx = run(x, targets, grad, inplace_backward=inplace, **options)
    oracle = x.double().requires_grad_()
    expected = exact_logprobs(oracle, targets, **options)
    expected.backward(grad.double())
    assert oracle.grad is not None
    assert logp.dtype == torch.float32 and dx.dtype == dtype
    assert (logp - expected).abs().max() <= 1e-5 and (logp <= 0).all()
    assert worst(dx, oracle.grad) < (2e-6 if dtype == torch.float32 else ULP_BF16)
    if "vocab_size" in options:
        assert not dx[:, 131:].any()


def test_more_columns_than_a_block(device: torch.device) -> None:
    """Three steps of the online softmax; the maximum is in the first, the middle or the last."""
    x = torch.randn(6, 9001, device=device)
    x[torch.arange(6), torch.tensor([5, 4095, 4096, 5000, 8999, 9000])] = 30.0
    targets = torch.tensor([5, 7, 4096, 8192, 0, 9000], device=device)
    grad = torch.randn(6, device=device)
    logp, dx = run(x, targets, grad)
    oracle = x.double().requires_grad_()
    expected = exact_logprobs(oracle, targets)
    expected.backward(grad.double())
    assert oracle.grad is not None
    assert torch.allclose(logp.double(), expected, rtol=1e-6, atol=0)
    assert worst(dx, oracle.grad) < 1e-6


def test_extreme_logits_keep_relative_precision(device: torch.device) -> None:
    """Gaps of -100 .. 1e4 nats on both sides; log p and 1 - p stay relatively exact (1e-5) down to 1e-30."""
    x = torch.randn(40, 300, device=device)
    targets = torch.randint(300, (40,), device=device)
    gaps = torch.tensor([18.0, 25.0, 40.0, -100.0, 100.0, 60.0, -40.0, 0.0], device=device).repeat(5)
    x[torch.arange(40), targets] += gaps
    wild = (torch.rand(24, 300, device=device) - 0.5) * 2e4
    x, targets = torch.cat([x, wild]), torch.cat([targets, wild.argmax(1)[:12], targets[:12]])
    logp, dx = run(x, targets, torch.ones(64, device=device))
    expected = exact_logprobs(x, targets)
    assert torch.isfinite(logp).all() and (logp <= 0).all()
    assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-30)
    at_target = dx.gather(1, targets[:, None]).squeeze(1).double()
    assert torch.allclose(at_target, -torch.expm1(expected), rtol=1e-5, atol=1e-30)
    assert torch.allclose(dx.double().sum(1), torch.zeros(64, dtype=torch.float64, device=device), atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_further_apart_than_2_to_the_31(backend: str, device: torch.device) -> None:
    """T x V > 2^31 elements: the last row's offset does not fit 32 bits. Only the pages of three rows are touched."""
    stride = 2**30 + 64
    memory = torch.empty(2 * stride + 128, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((3, 96), (stride, 1))
    x.copy_(torch.randn(3, 96))
    targets, grad = torch.tensor([1, 95, 40], device=device), torch.ones(3, device=device)
    expected = exact_logprobs(x, targets)
    leaf = x.detach().requires_grad_()
    logits = leaf.view_as(leaf)
    logp = vocab_parallel_logprobs(logits, targets, inplace_backward=True, backend=backend)
    (dx,) = torch.autograd.grad(logp, logits, grad)
    assert worst(logp, expected) < 1e-6
    assert dx.stride(0) == stride and dx.data_ptr() == memory.data_ptr()
    at_target = dx.gather(1, targets[:, None]).squeeze(1).double()
    assert worst(at_target, -torch.expm1(expected)) < ULP_BF16


def test_masked_tokens_are_not_read_and_the_result_repeats_bit_by_bit(device: torch.device) -> None:
    x = torch.randn(9, 5000, device=device).bfloat16()
    targets, grad = torch.randint(5000, (9,), device=device), torch.randn(9, device=device)
    grad[3:5] = 0
    x[4] = torch.nan
    first, again = (run(x, targets, grad, inplace_backward=True) for _ in range(2))
    assert torch.equal(first[1], again[1]) and torch.equal(first[0].view(torch.int32), again[0].view(torch.int32))
    assert first[0][4].isnan() and not first[1][3:5].any() and first[1].isfinite().all()


def test_minus_infinity_is_a_masked_column(device: torch.device) -> None:
    x = torch.randn(5, 70, device=device)
    x[:, 10:40] = -torch.inf
    targets, grad = torch.tensor([0, 9, 40, 69, 50], device=device), torch.ones(5, device=device)
    logp, dx = run(x, targets, grad)
    assert worst(logp, exact_logprobs(x, targets)) < 1e-6
    assert dx.isfinite().all() and not dx[:, 10:40].any()


def test_second_backward_after_in_place_is_refused(device: torch.device) -> None:
    x = torch.randn(4, 30, device=device).requires_grad_()
    logits, targets = x * 1, torch.randint(30, (4,), device=device)
    total = vocab_parallel_logprobs(logits, targets, inplace_backward=True, backend="triton").sum()
    (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, logits)
    kept = vocab_parallel_logprobs(x * 1, targets, backend="triton").sum()
    once = torch.autograd.grad(kept, x, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(kept, x)[0])


def test_corners(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    empty = torch.zeros(0, 20, device=device, requires_grad=True)
    logp = vocab_parallel_logprobs(empty, none, backend="triton")
    logp.sum().backward()
    assert logp.shape == (0,) and empty.grad is not None and empty.grad.shape == (0, 20)
    one = torch.randn(1, 1, device=device)  # a vocabulary of one token: certain
    logp, dx = run(one, torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, device=device))
    assert logp.item() == 0.0 and dx.item() == 0.0
    wide = torch.randn(4, 64, device=device)[:, :50]  # a column slice: rows further apart than they are long
    targets = torch.randint(50, (4,), device=device)
    logp, _ = run(wide, targets, torch.ones(4, device=device))
    assert worst(logp, exact_logprobs(wide, targets)) < 1e-6


def test_bad_input_is_named(device: torch.device) -> None:
    x, targets = torch.randn(4, 50, device=device), torch.randint(50, (4,), device=device)
    for match, logits, ids in (
        (r"float64 is not one of", x.double(), targets),
        (r"logits have strides \(1, 4\)", torch.randn(50, 4, device=device).t(), targets),
        (r"targets are torch.float32", x, targets.float()),
        (r"logits is torch.int64", targets[:, None].expand(4, 50), targets),
        (r"logits is on meta", x.to("meta"), targets),
    ):
        with pytest.raises(ConfigError, match=match):
            vocab_parallel_logprobs(logits, ids, backend="triton")
