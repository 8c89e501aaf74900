"""The torch backend against torch.log_softmax in float64, on fresh random inputs; forward and every gradient."""

from __future__ import annotations

import gc
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megafuse.errors import ConfigError, DataError
from megafuse.kernels.logprob import linear_logprobs, segment_logprobs, vocab_parallel_logprobs

F64 = torch.float64
U_BF16 = 2.0**-8  # largest relative error of rounding to bfloat16


@pytest.fixture(autouse=True)
def _fresh_seed(record_property: Any) -> None:
    seed = random.SystemRandom().randrange(2**31)
    record_property("seed", seed)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


def reference(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    z = logits[:, :vocab_size].double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """log((1 - p) / p) in float64 without cancellation; log p is -softplus of it."""
    others = logits.detach().double().scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    return others - logits.detach().double().gather(1, targets[:, None]).squeeze(1)


def leaf(*shape: int, dtype: torch.dtype = F64, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=F64) * scale).to(dtype).requires_grad_()


def worst(a: Tensor, b: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max().clamp(min=1e-300))


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.5},
    {"temperature": 1.6, "softcap": 4.0, "vocab_size": 131},
    {"vocab_size": 131},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_vocab_parallel(dtype: torch.dtype, inplace: bool, options: dict[str, Any]) -> None:
    source = leaf(37, 150, dtype=dtype, scale=3)
    targets = torch.randint(131, (37,))
    grad = torch.randn(37, dtype=F64)
    logp = vocab_parallel_logprobs(source * 1, targets, inplace_backward=inplace, **options)
    logp.backward(grad.to(dtype))
    oracle = source.detach().double().requires_grad_()
    expected = reference(oracle, targets, **options)
    expected.backward(grad)
    bound = 1e-13 if dtype == F64 else 2e-6
    assert logp.dtype == dtype
    assert worst(logp, expected) < bound
    assert source.grad is not None and oracle.grad is not None
    assert worst(source.grad, oracle.grad) < bound
    if "vocab_size" in options:
        assert not source.grad[:, 131:].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("workspace", [1 << 30, 12_000, 1])
@pytest.mark.parametrize("rows", ["identity", "subset", "repeated"])
def test_linear(rows: str, workspace: int, options: dict[str, Any]) -> None:
    hidden, weight = leaf(24, 12), leaf(150, 12)
    index = {
        "identity": torch.arange(24),
        "subset": torch.randperm(24)[:15],
        "repeated": torch.cat([torch.randint(24, (60,)), torch.full((6,), 3)]),
    }[rows]
    targets = torch.randint(131, index.shape)
    targets[-3:] = 0  # equal (row, id) pairs among the repeated rows
    grad = torch.randn(index.shape, dtype=F64)
    logp = linear_logprobs(
        hidden,
        weight,
        targets,
        row_index=None if rows == "identity" else index,
        workspace_bytes=workspace,
        **options,
    )
    logp.backward(grad)
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    expected = reference((h @ w.t())[index], targets, **options)
    expected.backward(grad)
    assert worst(logp, expected) < 1e-13
    for ours, theirs in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert ours is not None and theirs is not None
        assert worst(ours, theirs) < 1e-12


def test_vocab_start_and_gradcheck() -> None:
    hidden, weight, targets = leaf(6, 4), leaf(9, 4), torch.randint(9, (6,)) + 100
    index = torch.tensor([0, 0, 5, 2, 2, 2])

    def linear(h: Tensor, w: Tensor) -> Tensor:
        return linear_logprobs(h, w, targets, row_index=index, vocab_start=100, softcap=3.0, temperature=0.8)

    assert torch.autograd.gradcheck(linear, (hidden, weight))
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_logprobs(z, targets, vocab_start=100), (leaf(6, 9),))


def test_large_logits_and_never_positive() -> None:
    """Float32 logits of +-1e4: the differences are exact, so log p keeps its relative precision.

    log p is about -exp(x) for a confident target; x = log s is rounded to 2^-24 |x|, at most 5e-6 for log p > 1e-30.
    """
    logits = ((torch.rand(64, 300) - 0.5) * 2e4).float()
    targets = torch.randint(300, (64,))
    targets[::2] = logits.argmax(1)[::2]
    got = vocab_parallel_logprobs(logits, targets)
    expected = torch.nn.functional.logsigmoid(-log_odds(logits, targets))
    assert torch.isfinite(got).all() and (got <= 0).all()
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gap", [18.0, 25.0, 40.0])
def test_confident_targets_keep_relative_precision(gap: float) -> None:
    """1 - p is 1e-5 ... 1e-16 here; `1 - p` in float32 would be off by 6e-8, or 0."""
    logits = torch.randn(16, 200)
    targets = torch.randint(200, (16,))
    logits[torch.arange(16), targets] += gap
    logits.requires_grad_()
    got = vocab_parallel_logprobs(logits, targets)
    got.sum().backward()
    x = log_odds(logits, targets)
    assert torch.allclose(got.double(), torch.nn.functional.logsigmoid(-x), rtol=1e-5, atol=0)
    assert logits.grad is not None
    at_target = logits.grad.gather(1, targets[:, None]).squeeze(1).double()
    assert torch.allclose(at_target, torch.sigmoid(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("workspace", [1 << 30, 20_000])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_bfloat16(workspace: int, softcap: float | None) -> None:
    """Rigorous bounds, u = 2^-8 the rounding error of bfloat16.

    Forward: bfloat16 operands are exact, everything else is float32. Backward: dz is rounded once before a product with
    float32 accumulation, the product once for each of the c chunks: u (|dz| |W|) + u |sum| (twice for c > 1).
    """
    hidden, weight = leaf(50, 64, dtype=torch.bfloat16), leaf(500, 64, dtype=torch.bfloat16, scale=0.5)
    targets, grad = torch.randint(500, (50,)), torch.randn(50)
    logp = linear_logprobs(hidden, weight, targets, softcap=softcap, workspace_bytes=workspace)
    logp.backward(grad)
    assert logp.dtype == torch.float32
    logits = (hidden.detach().double() @ weight.detach().double().t()).requires_grad_()
    expected = reference(logits, targets, softcap=softcap)
    assert worst(logp, expected) < 2e-6
    expected.backward(grad.double())
    dz = logits.grad
    assert dz is not None and hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    chunks = 1 if workspace > 1 << 20 else 8
    for got, left, right, roundings in (
        (hidden.grad, dz, weight.detach().double(), 1),
        (weight.grad, dz.t(), hidden.detach().double(), 1 if chunks == 1 else 2),
    ):
        product, magnitude = left @ right, left.abs() @ right.abs()
        # After the first rounding of a chunk its size is bounded by `magnitude` only, not by the sum of the chunks.
        slack = U_BF16 * (magnitude * roundings + product.abs()) * 1.02 + 1e-6
        assert ((got.double() - product).abs() <= slack).all()


class _Products(TorchDispatchMode):
    """Shapes of every matrix product and the kinds that write logits."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.logit_rows, self.largest = vocab, [0], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] >= self.vocab:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
            if "mm" in str(func):
                self.logit_rows.append(out.shape[0])
        return out


def test_workspace_distinct_rows_and_recompute() -> None:
    vocab, distinct = 640, 40
    hidden, weight = leaf(64, 8, dtype=torch.float32), leaf(vocab, 8, dtype=torch.float32)
    index = torch.randperm(64)[:distinct].repeat(3)
    targets = torch.randint(vocab, index.shape)
    for workspace, passes in ((1 << 30, 1), (vocab * 4 * 16, 2)):
        with _Products(vocab) as seen:
            linear_logprobs(hidden, weight, targets, row_index=index, workspace_bytes=workspace).sum().backward()
        assert sum(seen.logit_rows) == passes * distinct  # each row once; again in backward only if it did not fit
        assert seen.largest <= min(workspace, (distinct + 1) * vocab * 4)
        if passes == 2:
            assert max(seen.logit_rows) < distinct


def test_no_grad_keeps_nothing_and_frozen_inputs() -> None:
    hidden, weight, targets = leaf(9, 5), leaf(20, 5), torch.randint(20, (9,))

    def kept() -> int:
        """Tensors alive that share memory of the size of the logits (and the spare element)."""
        alive = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() > 0]
        return sum(o.untyped_storage().nbytes() == (9 * 20 + 1) * 8 for o in alive)

    before = kept()
    with torch.no_grad():
        logp = linear_logprobs(hidden, weight, targets)
    assert logp.grad_fn is None and kept() == before
    logp = linear_logprobs(hidden.detach(), weight.detach(), targets)
    assert logp.grad_fn is None and kept() == before
    logp = linear_logprobs(hidden, weight, targets)
    assert logp.grad_fn is not None and kept() == before + 1  # kept for backward, so the count above means something
    del logp
    linear_logprobs(hidden, weight.detach(), targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    linear_logprobs(hidden.detach(), weight, targets).sum().backward()
    assert weight.grad is not None


def test_second_backward() -> None:
    hidden, weight, targets = leaf(9, 5), leaf(20, 5), torch.randint(20, (9,))
    logp = linear_logprobs(hidden, weight, targets)
    once = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(once, again))
    logits = leaf(9, 20) * 1
    total = vocab_parallel_logprobs(logits, targets, inplace_backward=True).sum()
    (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, logits)


def test_no_targets() -> None:
    hidden, weight = leaf(7, 5), leaf(20, 5)
    none = torch.zeros(0, dtype=torch.int64)
    logp = linear_logprobs(hidden, weight, none, row_index=none)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.shape == hidden.shape and not hidden.grad.any() and not weight.grad.any()
    logits = leaf(0, 20)
    vocab_parallel_logprobs(logits, none).sum().backward()
    assert logits.grad is not None


def test_wrong_arguments_name_the_value() -> None:
    hidden, weight, targets = leaf(4, 5), leaf(20, 5), torch.tensor([1, 2, 3, 20])
    with pytest.raises(DataError, match=r"target id 20 .* vocabulary of 20"):
        linear_logprobs(hidden, weight, targets)
    with pytest.raises(DataError, match=r"target id 3 .* vocabulary of 3"):
        vocab_parallel_logprobs(leaf(4, 20), targets.clamp(max=3), vocab_size=3)
    with pytest.raises(DataError, match="target id -1"):
        linear_logprobs(hidden, weight, targets - 2 - targets.clamp(min=1) + 1)
    good = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DataError, match="row_index holds 9"):
        linear_logprobs(hidden, weight, good, row_index=good + 9)
    for match, kwargs in (
        ("backend='cuda' is not known", {"backend": "cuda"}),
        ("temperature=0", {"temperature": 0.0}),
        ("softcap=-1", {"softcap": -1.0}),
        ("workspace_bytes=0", {"workspace_bytes": 0}),
    ):
        with pytest.raises(ConfigError, match=match):
            linear_logprobs(hidden, weight, good, **kwargs)
    for kind in (torch.bool, torch.float32, torch.int16, torch.complex64):
        with pytest.raises(ConfigError, match=f"row_index is {kind}: int64 or int32 is needed"):
            linear_logprobs(hidden, weight, good, row_index=good.to(kind))
        with pytest.raises(ConfigError, match=f"segment_ids are {kind} .* int64 or int32"):
            segment_logprobs(torch.zeros(4), good.to(kind), 2)
    linear_logprobs(hidden, weight, good, row_index=good.int())
    with pytest.raises(ConfigError, match=r"float64 but weight is torch\.float32"):
        linear_logprobs(hidden, weight.float(), good)
    with pytest.raises(ConfigError, match="pass row_index"):
        linear_logprobs(hidden, weight, good[:2])
    with pytest.raises(DataError, match="segment_ids holds 2"):
        segment_logprobs(torch.zeros(3), torch.tensor([0, 1, 2]), 2)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("mean", [False, True])
def test_segment_sums(mean: bool, order: str) -> None:
    """2048 tokens a segment: float64 sums rounded once to float32, relative error at most 2^-24."""
    lengths = torch.tensor([2048, 1, 0, 700, 2048])
    ids = torch.cat([torch.arange(5).repeat_interleave(lengths), torch.full((9,), -1)])
    if order == "shuffled":
        ids = ids[torch.randperm(ids.numel())]
    logp = -torch.rand(ids.numel()).exp() * 3
    logp[ids < 0] = torch.nan
    logp.requires_grad_()
    got, counts = segment_logprobs(logp, ids.int(), 5, normalize="mean" if mean else "none")
    assert counts.tolist() == lengths.tolist() and counts.dtype == torch.int64 and got.dtype == torch.float32
    for i, n in enumerate(lengths.tolist()):
        exact = math.fsum(logp[ids == i].tolist()) / (max(n, 1) if mean else 1)
        assert abs(float(got[i]) - exact) <= 2.0**-24 * 1.01 * abs(exact)
    grad = torch.randn(5)
    got.backward(grad)
    scale = grad / lengths.clamp(min=1) if mean else grad
    assert logp.grad is not None
    assert torch.allclose(logp.grad, torch.where(ids < 0, 0, scale[ids.clamp(min=0)]), rtol=1e-6)


def test_segment_corners() -> None:
    sums, counts = segment_logprobs(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3)
    assert sums.tolist() == [0, 0, 0] and counts.tolist() == [0, 0, 0]
    assert segment_logprobs(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0)[0].shape == (0,)
    ids = torch.tensor([1, 0, 1, -1])
    assert torch.autograd.gradcheck(lambda x: segment_logprobs(x, ids, 3, normalize="mean")[0], (leaf(4),))
