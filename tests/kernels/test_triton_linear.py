"""The linear log-probs in Triton against float64, on fresh random inputs: interpreted on a CPU, compiled on a GPU."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megafuse.errors import ConfigError, DataError
from megafuse.kernels._logprob_torch import TorchRows, _Chunks
from megafuse.kernels._vocab_softmax import Head
from megafuse.kernels.logprob import linear_logprobs, linear_logprobs_and_entropy
from megafuse.testing.kernel_oracle import ULP_BF16, dyadic_head, exact_logprobs, hard_head, poisoned_memory, worst

OPTIONS = [
    {},
    {"temperature": 0.8},
    {"softcap": 5.0},
    {"temperature": 1.6, "softcap": 30.0, "vocab_size": 271},
    {"vocab_size": 271},
]


def run(h: Tensor, w: Tensor, targets: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """(log-probs, entropies, gradient of hidden, gradient of weight)."""
    hidden, weight = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    logp, entropy = linear_logprobs_and_entropy(hidden, weight, targets, backend="triton", **options)
    logp.backward(grad)
    assert hidden.grad is not None and weight.grad is not None
    return logp.detach(), entropy, hidden.grad, weight.grad


def exact(h: Tensor, w: Tensor, targets: Tensor, grad: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, ...]:
    hidden, weight = h.double().requires_grad_(), w.double().requires_grad_()
    logits = (hidden @ weight.t())[index]
    logp = exact_logprobs(logits, targets, **options)
    logp.backward(grad.double())
    every = logits.detach()[:, : options.pop("vocab_size", None)]
    cap = options.pop("softcap", None)
    z = (cap * torch.tanh(every / cap) if cap else every) / options.pop("temperature", 1.0)
    assert hidden.grad is not None and weight.grad is not None
    return logp.detach(), torch.distributions.Categorical(logits=z).entropy(), hidden.grad, weight.grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    """40 targets of 29 rows, one row three times; two row tiles, three column tiles (the last one ragged)."""
    h, w, _ = (t.to(device) for t in hard_head(29, 300, 48, dtype, confidence=8.0))
    index = torch.cat([torch.randint(29, (37,)), torch.full((3,), 4)]).to(device)
    targets = torch.randint(271, (40,), device=device)
    targets[0], targets[1] = 0, 270
    grad = torch.randn(40, device=device)
    with poisoned_memory():
        logp, entropy, dh, dw = run(h, w, targets, grad, row_index=index.cpu(), **options)
    want, want_entropy, want_dh, want_dw = exact(h, w, targets, grad, index, **options)
    assert logp.dtype == torch.float32 and dh.dtype == dw.dtype == dtype
    assert (logp - want).abs().max() <= 1e-5 and (logp <= 0).all()
    assert (entropy - want_entropy).abs().max() <= 1e-5
    # bfloat16: E, v x and the result are rounded once each (cut off, in the interpreter).
    bound = 2e-6 if dtype == torch.float32 else 2 * ULP_BF16
    assert worst(dh, want_dh) < bound and worst(dw, want_dw) < bound
    if "vocab_size" in options:
        assert not dw[271:].any()


def test_chunks_end_with_a_full_one(device: torch.device) -> None:
    from megafuse.kernels._linear_triton import cut

    for rows, fit, tile in ((8192, 4185, 128), (8193, 4185, 128), (100, 1000, 128), (5, 1, 128), (5, 0, 4), (0, 9, 4)):
        parts = cut(rows, fit, tile)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
        assert all(0 < part.stop - part.start <= max(fit, 1) for part in parts)
        assert not parts or parts[-1].stop - parts[-1].start == max(part.stop - part.start for part in parts)
    assert [part.stop for part in cut(8192, 4185, 128)] == [4096, 8192]


@pytest.mark.bits
def test_products_of_a_dyadic_head_are_the_same_bits_in_any_order(device: torch.device) -> None:
    """What tests of bits stand on in the interpreter: wherever a row stands, and from whichever end it is added up."""
    h, w, _ = hard_head(34, 200, 32, torch.float32, confidence=8.0)
    hidden, weight = dyadic_head(h, w)
    assert (hidden - h).abs().max() <= 2.0**-8 and (weight - w).abs().max() <= 2.0**-8
    want = (hidden.double() @ weight.double().t()).numpy()
    order = torch.randperm(34)
    a, b = hidden.numpy(), weight.numpy()
    moved = np.empty_like(want, dtype=np.float32)
    moved[order] = a[order] @ b.T
    for product in (a @ b.T, a[:, ::-1] @ b[:, ::-1].T, moved, (hidden @ weight.t()).numpy()):
        assert product.dtype == np.float32 and np.array_equal(product, want)
    with pytest.raises(ValueError, match=r"bits=12: sums reach .* take fewer bits"):
        dyadic_head(h, w, bits=12)


@pytest.mark.bits
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("workspace", [20_000, 1])
def test_chunks_and_loads_change_nothing(
    workspace: int, tma: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks, the earlier ones computed again; descriptor and pointer loads. Log-probs are the same bits.

    A chunk moves a row to another place of its tile. A GPU's product of the row does not depend on that, the
    interpreter's may: there the logits are numbers that float32 adds up exactly, so that only the kernels are tested.
    """
    from megafuse.kernels import _linear_triton

    h, w, targets = (t.to(device) for t in hard_head(34, 200, 32, torch.float32, confidence=8.0))
    if device.type == "cpu":
        h, w = dyadic_head(h, w)
    if workspace == 1:
        h, targets = h[:3], targets[:3]
    grad = torch.randn(targets.shape[0], device=device)
    whole = run(h, w, targets, grad)
    real = _linear_triton.plan
    if device.type == "cpu":
        monkeypatch.setattr(_linear_triton, "plan", lambda *a: dataclasses.replace(real(*a), tma=tma))
    cut = run(h, w, targets, grad, workspace_bytes=workspace)
    assert torch.equal(cut[0], whole[0]) and torch.equal(cut[1], whole[1])
    assert worst(cut[2], whole[2]) < 1e-6 and worst(cut[3], whole[3]) < 1e-6


def test_gaps_beyond_the_exponents_take_the_other_anchor(device: torch.device) -> None:
    """Targets 100 .. 400 nats below the largest logit: their sums overflow and their rows are done again, alone."""
    w = torch.randn(260, 16, device=device)
    h = torch.randn(12, 16, device=device)
    h[::2] *= 45.0
    targets = torch.randint(260, (12,), device=device)
    logits = h.double() @ w.double().t()
    targets[:6] = logits[:6].argmin(1)
    targets[6:9] = logits[6:9].argmax(1)
    grad = torch.randn(12, device=device)
    want = exact(h, w, targets, grad, torch.arange(12, device=device))
    assert want[0].min() < -100
    for workspace in (1 << 30, 6000):
        logp, entropy, dh, dw = run(h, w, targets, grad, workspace_bytes=workspace)
        # Float32 logits of some 500 are off by 6e-5: that much of log p where p is small, of 1 - p where it is not.
        size = want[0].abs()
        # Below e^-59 float32 has no room left beside the 2^-40: log p is 0 there.
        assert ((logp.double() - want[0]).abs() <= 2e-6 * size + 3e-4 * size.clamp(max=1) + 1e-24).all()
        assert (entropy - want[1]).abs().max() < 2e-4
        assert worst(dh, want[2]) < 2e-4 and worst(dw, want[3]) < 2e-4


def test_confident_targets_keep_relative_precision(device: torch.device) -> None:
    """log p from -1e-5 to -1e-17: 1 - p is not a difference."""
    w = torch.nn.functional.normalize(torch.randn(100, 64, device=device), dim=1)
    targets = torch.randint(100, (10,), device=device)
    h = w[targets] * torch.linspace(25.0, 65.0, 10, device=device)[:, None]
    grad = torch.ones(10, device=device)
    logp, _, _, _ = run(h, w, targets, grad)
    want = exact(h, w, targets, grad, torch.arange(10, device=device))[0]
    assert want.max() > -1e-9 and torch.allclose(logp.double(), want, rtol=3e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bfloat16_response_of_512_tokens(backend: str, device: torch.device) -> None:
    """Bounds of the contract: 2e-3 a token, 0.05 nat a response; no logit is ever rounded to bfloat16."""
    h, w, targets = (t.to(device) for t in hard_head(512, 640, 64, torch.bfloat16))
    want = exact_logprobs(h.double() @ w.double().t(), targets)
    for workspace in (1 << 30, 400_000):
        with torch.no_grad():
            logp = linear_logprobs(h, w, targets, backend=backend, workspace_bytes=workspace)
        error = logp.double() - want
        assert error.abs().max() <= 2e-5 and error.sum().abs() <= 1e-3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_gradients_in_chunks_with_rows_left_out(
    softcap: float | None, backend: str, device: torch.device
) -> None:
    """torch's gradient of the logits takes the front of their own float32 memory, after gaps in it were closed."""
    h, w, _ = (t.to(device) for t in hard_head(29, 300, 48, torch.bfloat16, confidence=8.0))
    index, targets = torch.randint(29, (40,)).to(device), torch.randint(300, (40,), device=device)
    grad = torch.randn(40, device=device)
    grad[torch.rand(40) < 0.4] = 0
    want = exact(h, w, targets, grad, index, softcap=softcap)
    for workspace in (1 << 30, 16_000, 4_000):
        hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        options: dict[str, Any] = {"softcap": softcap, "backend": backend, "workspace_bytes": workspace}
        with poisoned_memory():
            logp = linear_logprobs(hidden, weight, targets, row_index=index.cpu(), **options)
            logp.backward(grad)
        assert hidden.grad is not None and weight.grad is not None
        assert (logp - want[0]).abs().max() <= 1e-5
        assert worst(hidden.grad, want[2]) < 2 * ULP_BF16 and worst(weight.grad, want[3]) < 3 * ULP_BF16


def test_float32_logits_and_upcast_columns_stay_in_the_workspace() -> None:
    """bfloat16 operands on a CPU: neither all logits nor the weight exist in float32 where the workspace is smaller."""
    h, w, targets = hard_head(64, 640, 64, torch.bfloat16)
    workspace = 60_000
    assert workspace < w.numel() * 4 and workspace < 64 * 640 * 4

    class Wide(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                self.largest = max(self.largest, out.untyped_storage().nbytes())
            return out

    with Wide() as seen:
        linear_logprobs(h.requires_grad_(), w.requires_grad_(), targets, backend="torch", workspace_bytes=workspace)
    assert 0 < seen.largest <= workspace
    chunks = _Chunks(h, w, Head(0, 640, 1.0, None, None), workspace)
    assert chunks.scratch.bytes + chunks.block * 64 * 4 + chunks.size * 640 * 4 <= workspace
    assert min(64, TorchRows.fit(w, workspace)) <= chunks.size < 64


@pytest.mark.bits
def test_without_a_gradient_nothing_is_stored(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from megafuse.kernels import _linear_triton

    seen: list[Any] = []
    real = _linear_triton.Product.__init__

    def record(self: Any, *args: Any) -> None:
        real(self, *args)
        seen.append(self.e)

    monkeypatch.setattr(_linear_triton.Product, "__init__", record)
    h, w, targets = (t.to(device) for t in hard_head(8, 90, 16, torch.float32))
    kept = linear_logprobs(h.clone().requires_grad_(), w, targets, backend="triton")
    with torch.no_grad():
        plain = linear_logprobs(h.clone().requires_grad_(), w, targets, backend="triton")
    assert [e is None for e in seen] == [False, True]
    assert torch.equal(kept.detach(), plain) and plain.grad_fn is None


@pytest.mark.bits
def test_second_backward_frozen_inputs_and_repeatability(device: torch.device) -> None:
    h, w, targets = (t.to(device) for t in hard_head(20, 150, 16, torch.bfloat16))
    h, w = h.requires_grad_(), w.requires_grad_()
    logp = linear_logprobs(h, w, targets, backend="triton")
    once = torch.autograd.grad(logp.sum(), (h, w), retain_graph=True)
    again = torch.autograd.grad(logp.sum(), (h, w))
    fresh = torch.autograd.grad(linear_logprobs(h, w, targets, backend="triton").sum(), (h, w))
    for a, b, c in zip(once, again, fresh):
        assert torch.equal(a, b) and torch.equal(a, c)
    (only,) = torch.autograd.grad(linear_logprobs(h, w.detach(), targets, backend="triton").sum(), h)
    assert torch.equal(only, once[0])
    (only,) = torch.autograd.grad(linear_logprobs(h.detach(), w, targets, backend="triton").sum(), w)
    assert torch.equal(only, once[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_is_added_to(tied: bool, backend: str, device: torch.device) -> None:
    """Two micro-batches on top of what was there; autograd's own gradient is a mere signal, zero for tied weights."""
    h, w, targets = (t.to(device) for t in hard_head(24, 150, 16, torch.bfloat16, confidence=6.0))
    weight: Any = torch.nn.Parameter(w)
    weight.main_grad = torch.randn(150, 16, device=device)
    weight.grad_added_to_main_grad = False
    if tied:
        weight.zero_out_wgrad = True
    before = weight.main_grad.clone()
    grad = torch.randn(24, device=device)
    exact_dw = torch.zeros(150, 16, dtype=torch.float64, device=device)
    for workspace in (1 << 30, 5000):
        logp = linear_logprobs(h, weight, targets, backend=backend, accumulate="auto", workspace_bytes=workspace)
        logp.backward(grad)
        exact_dw += exact(h, w, targets, grad, torch.arange(24, device=device))[3]
        assert weight.grad_added_to_main_grad and weight.grad is not None
        if tied:
            assert not weight.grad.any()
        weight.grad, weight.grad_added_to_main_grad = None, False
    added = weight.main_grad.double() - before.double()
    assert worst(added, exact_dw) < 2 * ULP_BF16
    del weight.grad_added_to_main_grad
    linear_logprobs(h, weight, targets, backend=backend, accumulate="main_grad").backward(grad)
    assert weight.grad is None


def test_no_targets_and_masked_targets(device: torch.device) -> None:
    h, w, targets = (t.to(device) for t in hard_head(9, 70, 16, torch.float32))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    with poisoned_memory():
        logp, entropy, dh, dw = run(h, w, none, torch.zeros(0, device=device), row_index=none.cpu())
    assert logp.shape == entropy.shape == (0,)
    assert dh.shape == h.shape and not dh.any() and not dw.any()
    logp, _, dh, dw = run(h, w, targets, torch.zeros(9, device=device))  # a row whose responses are all masked
    assert not dh.any() and not dw.any()


@pytest.mark.parametrize("tma", [True, False])
def test_rows_of_exponentials_further_apart_than_2_to_the_31(
    tma: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T x V > 2^31 elements of the workspace, written through descriptors and (sm_80, unaligned operands) pointers;
    only the pages of three rows are touched.
    """
    from megafuse.kernels import _linear_triton

    h, w, targets = (t.to(device) for t in hard_head(3, 96, 16, torch.bfloat16, confidence=6.0))
    grad = torch.randn(3, device=device)
    real = _linear_triton.plan

    def plan(*args: Any) -> Any:
        tiles = real(*args)
        small = {} if device.type == "cpu" else {"bn": 128, "stages": 3}  # what pointers are used with
        return tiles if tma else dataclasses.replace(tiles, tma=False, **small)

    monkeypatch.setattr(_linear_triton, "plan", plan)
    monkeypatch.setattr(_linear_triton, "row_stride", lambda columns: 2**30 + 64)
    logp, _, dh, dw = run(h, w, targets, grad, workspace_bytes=1 << 34)
    want = exact(h, w, targets, grad, torch.arange(3, device=device))
    assert (logp - want[0]).abs().max() <= 1e-5
    assert worst(dh, want[2]) < 2 * ULP_BF16 and worst(dw, want[3]) < 2 * ULP_BF16


@pytest.mark.bits
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_entropy_refuses_a_gradient(backend: str, device: torch.device) -> None:
    h, w, targets = (t.to(device) for t in hard_head(4, 20, 16, torch.float32))
    h.requires_grad_()
    logp, entropy = linear_logprobs_and_entropy(h, w, targets, backend=backend)
    with pytest.raises(ConfigError, match=r"has no gradient: use entropy\.detach"):
        (logp.sum() + 0.01 * entropy.sum()).backward()
    logp, entropy = linear_logprobs_and_entropy(h, w, targets, backend=backend)
    (logp.sum() + 0.01 * entropy.detach().sum()).backward()
    plain = linear_logprobs(again := h.detach().clone().requires_grad_(), w, targets, backend=backend)
    plain.sum().backward()
    assert h.grad is not None and again.grad is not None and torch.equal(h.grad, again.grad)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_with_coefficient_0_are_not_read(backend: str, device: torch.device) -> None:
    """On a CPU their rows are left out of the products of the gradients; infinite hidden states would show."""
    h, w, targets = (t.to(device) for t in hard_head(12, 90, 16, torch.float32, confidence=6.0))
    grad = torch.randn(12, device=device)
    grad[[0, 3, 4, 11]] = 0
    want = exact(h, w, targets, grad, torch.arange(12, device=device))
    hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
    logp = linear_logprobs(hidden, weight, targets, backend=backend, workspace_bytes=3000)
    logp.backward(grad)
    assert worst(hidden.grad, want[2]) < 2e-6 and worst(weight.grad, want[3]) < 2e-6  # type: ignore[arg-type]
    assert hidden.grad is not None and not hidden.grad[[0, 3, 4, 11]].any()


def test_a_weight_of_any_strides_in_torch() -> None:
    h, w, targets = hard_head(6, 40, 16, torch.float32)
    h, w = dyadic_head(h, w)  # log p of a sure target is near 0: strides may change the order of a sum, not its value
    turned = w.t().contiguous().t()
    assert turned.stride() == (1, 40)
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (w, turned)]
    values = [linear_logprobs(h, leaf, targets, backend="torch") for leaf in leaves]
    values[0].sum().backward()
    values[1].sum().backward()
    assert torch.allclose(*values, rtol=1e-6) and torch.allclose(leaves[0].grad, leaves[1].grad, atol=1e-6)


def test_bad_input_is_named(device: torch.device) -> None:
    h, w, targets = (t.to(device) for t in hard_head(4, 20, 16, torch.float32))
    for match, call in (
        (
            r"weight has strides \(1, 20\)",
            lambda: linear_logprobs(h, w.t().contiguous().t(), targets, backend="triton"),
        ),
        (r"float16 is not one of", lambda: linear_logprobs(h.half(), w.half(), targets, backend="triton")),
        (r"hidden \[4, 16\] must be .* weight \[20, 15\]", lambda: linear_logprobs(h, w[:, :15], targets)),
        (r"targets \[4, 1\] \[T\]", lambda: linear_logprobs(h, w, targets[:, None])),
        (r"hidden is torch.float32 but weight is torch.bfloat16", lambda: linear_logprobs(h, w.bfloat16(), targets)),
        (r"weight is on meta", lambda: linear_logprobs(h, w.to("meta"), targets, backend="triton")),
        (r"targets are torch.float32", lambda: linear_logprobs(h, w, targets.float(), backend="triton")),
        (r"accumulate='x' is not known", lambda: linear_logprobs(h, w, targets, accumulate="x")),
        (r"weight has no attribute main_grad", lambda: linear_logprobs(h, w, targets, accumulate="main_grad")),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    short: Any = torch.nn.Parameter(w)
    short.main_grad = torch.zeros(19, 16, device=device)
    with pytest.raises(ConfigError, match=r"weight.main_grad is \[19, 16\]"):
        linear_logprobs(h, short, targets, accumulate="main_grad")
    outside = targets.clone()
    outside[2] = 20
    if device.type == "cpu":
        with pytest.raises(DataError, match="target id 20"):
            linear_logprobs(h, w, outside, backend="triton")
    else:
        assert linear_logprobs(h, w, outside, backend="triton")[2] == -torch.inf
