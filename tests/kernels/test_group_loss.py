"""The head and the loss of whole groups in one loop, against float64 autograd on all logits, and against its promises:
three products, one workspace, rows without a gradient left out, nothing that a caller could misuse in silence.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megafuse.errors import ConfigError
from megafuse.kernels._segments import segment_logprobs
from megafuse.kernels.group_loss import Blocks, linear_group_loss
from megafuse.kernels.logprob import linear_logprobs
from megafuse.testing.group_problem import SETTINGS, Problem, problem
from megafuse.testing.kernel_oracle import ULP_BF16, dyadic_head, poisoned_memory, worst

BACKENDS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"vocab_size": 131},
    "all": {"vocab_size": 140, "softcap": 5.0, "temperature": 0.8},
}


def bound(dtype: torch.dtype) -> float:
    """Of a gradient, relative to its largest entry: float32 statistics, or the roundings of bfloat16 operands.

    A chunk's rounded part is added to the others': one rounding more where a prompt's row is in two chunks.
    """
    return {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3 * ULP_BF16}[dtype]


def workspace(p: Problem, rows: int, backend: str) -> int:
    """Bytes that hold the exponentials of `rows` targets."""
    columns = p.weight.shape[0] if backend == "torch" else -(-p.weight.shape[0] // 64) * 64
    size = max(p.weight.element_size(), 4 if backend == "torch" else 1)  # torch's logits are float32 at least
    return rows * columns * size * (4 if backend == "torch" else 3) // 3


def run(p: Problem, *, up: float = 1.0, given: dict[str, Any] | None = None, **options: Any) -> tuple[Any, ...]:
    """(loss, metrics, gradient of hidden, gradient of weight)."""
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    value, metrics = linear_group_loss(
        hidden, weight, p.targets, p.groups(**given or {}), row_index=p.row_index, **options
    )
    (value * up).backward()
    return value.detach(), metrics, hidden.grad, weight.grad


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=lambda x: str(x).rpartition(".")[2])
def test_against_float64(backend: str, dtype: torch.dtype, name: str, device: torch.device) -> None:
    """Every loss; whole, in chunks of blocks, and with blocks that do not fit; zero weights and equal rewards."""
    slow = backend == "triton" and device.type == "cpu"  # the interpreter
    if slow and dtype == torch.bfloat16 and name not in ("sft", "dpo"):
        pytest.skip("the losses are not bfloat16's concern")
    for kind, options in OPTIONS.items() if not slow else [("all", OPTIONS["all"])]:
        p = problem(name, dtype=dtype, device=device, level=kind == "all", groups=3 if slow else 5)
        want = p.exact(**options)
        for rows in (10_000, 16, 5) if not slow else (9,):
            room = workspace(p, rows, backend)
            with poisoned_memory():
                got = run(p, backend=backend, workspace_bytes=room, **options)
            tight = 1e-13 if dtype == torch.float64 else 1e-5
            assert abs(float(got[0]) - float(want[0])) <= tight * max(1.0, abs(float(want[0]))), (kind, rows)
            for metric, pair in want[1].items():
                assert torch.allclose(got[1][metric], pair, rtol=10 * tight, atol=10 * tight), (metric, kind, rows)
            assert worst(got[2], want[2]) < bound(dtype) and worst(got[3], want[3]) < bound(dtype), (kind, rows)
            assert got[2].dtype == got[3].dtype == dtype and not got[3][options["vocab_size"] :].any()


def _block_targets(p: Problem) -> list[int]:
    return [int(part.sum()) for part in p.blocks.counts[0].split(p.blocks.sizes)]


class _Products(TorchDispatchMode):
    """Rows of torch's matrix products: those that make logits, and those that take a matrix as wide as them."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.made, self.hidden, self.weight = vocab, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            a, b = args[-2:]
            self.made += a.shape[0] if b.shape[1] == self.vocab and a.shape[1] != self.vocab else 0
            self.hidden += a.shape[0] if a.shape[1] == self.vocab else 0
            self.weight += a.shape[1] if a.shape[0] == self.vocab else 0
        return func(*args, **(kwargs or {}))


def count(p: Problem, backend: str, call: Any) -> tuple[int, int, int, int]:
    """(rows of the product with E stored, of E W, of E^T x, most rows of E at once) of a call."""
    most = [0]
    made = [0]
    from megafuse.kernels import _linear_triton

    launch, take = _linear_triton.Product._launch, _linear_triton.Workspace.take

    def counting(self: Any, rows: slice, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("guarded"):  # those end at once unless a row overflowed
            made[0] += rows.stop - rows.start
        launch(self, rows, *args, **kwargs)

    def taking(self: Any, rows: int, stride: int, like: Tensor) -> Tensor:
        found = take(self, rows, stride, like)
        most[0] = max(most[0], self.flat.numel() * self.flat.element_size())
        return found

    with pytest.MonkeyPatch.context() as patch, _Products(p.weight.shape[0]) as seen:
        if backend == "triton":
            patch.setattr(_linear_triton.Product, "_launch", counting)
            patch.setattr(_linear_triton.Workspace, "take", taking)
        call()
    return made[0] or seen.made, seen.hidden, seen.weight, most[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_three_products_at_one_workspace(backend: str, device: torch.device) -> None:
    """Each row goes through each product once, however many chunks; without the loss in the loop, more than that."""
    p = problem("dpo", dtype=torch.float32, device=device, groups=8, longest=9)
    while p.blocks.counts.sum() < 60 or max(_block_targets(p)) > 20:
        p = problem("dpo", dtype=torch.float32, device=device, groups=8, longest=9)
    assert len(p.blocks.cut(20)) > 2
    room = workspace(p, 20, backend)
    rows = len(p.targets) if backend == "triton" else len(p.row_index.unique())
    made, hidden, weight, most = count(p, backend, lambda: run(p, backend=backend, workspace_bytes=room))
    # A prompt's last place is computed again where two chunks meet inside its group.
    shared = 0 if backend == "triton" else len(p.blocks.cut(20)) - 1
    assert rows <= made <= rows + shared and made == hidden == weight and most <= room

    def apart() -> None:
        hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        logp = linear_logprobs(hidden, weight, p.targets, row_index=p.row_index, backend=backend, workspace_bytes=room)
        n = len(p.rewards)
        p.loss(*segment_logprobs(logp, p.response.to(logp.device), n), slice(0, n))[0].backward()

    again, hidden, weight, _ = count(p, backend, apart)
    assert hidden == weight == rows and again > 1.4 * rows


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [10_000, 12])
def test_rows_without_a_gradient_are_left_out_of_both_products(
    rows: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal rewards without a KL penalty: the coefficients are exactly 0, and known before the products."""
    monkeypatch.setitem(SETTINGS, "rloo", {"beta_kl": 0.0})
    wanted = torch.zeros(1, dtype=torch.bool)
    while not 0.2 < wanted.double().mean() < 0.8:
        p = problem("rloo", dtype=torch.float32, device=device, groups=4, level=True)
        leaf = torch.zeros(len(p.rewards), device=device, requires_grad=True)
        lengths = p.blocks.counts[0].to(device)
        (coefficient,) = torch.autograd.grad(p.loss(leaf, lengths, slice(0, len(p.rewards)))[0], leaf)
        wanted = (coefficient != 0).cpu()[p.response]
    room, want = workspace(p, rows, backend), p.exact()
    live = int(wanted.sum()) if backend == "triton" else len(p.row_index[wanted].unique())
    made, hidden, weight, _ = count(p, backend, lambda: run(p, backend=backend, workspace_bytes=room))
    assert hidden == weight and live <= hidden < made
    assert hidden <= live + (0 if backend == "triton" else len(p.blocks.cut(rows)))
    got = run(p, backend=backend, workspace_bytes=room)
    assert worst(got[2], want[2]) < 2e-5 and worst(got[3], want[3]) < 2e-5
    # A row that no product reads may hold anything.
    dead = torch.ones(p.hidden.shape[0], dtype=torch.bool)
    dead[p.row_index[wanted]] = False
    assert not got[2][dead.to(device)].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_without_any_gradient_needs_no_product(backend: str, device: torch.device) -> None:
    p = problem("sft", dtype=torch.float32, device=device)
    p.terms.weights.zero_()
    made, hidden, weight, _ = count(p, backend, lambda: run(p, backend=backend))
    assert made > 0 and hidden == weight == 0
    got = run(p, backend=backend)
    assert got[2] is not None and not got[2].any() and not got[3].any() and float(got[0]) == 0


@pytest.mark.bits
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bits_of_a_second_run_and_of_another_cut(backend: str, device: torch.device) -> None:
    p = problem("ln_dpo", dtype=torch.float32, device=device)
    if device.type == "cpu":  # the interpreter's product of a row may depend on its place in a tile: none to round here
        p = replace(p, **dict(zip(("hidden", "weight"), dyadic_head(p.hidden, p.weight))))
    first, second = (run(p, backend=backend, workspace_bytes=workspace(p, 14, backend)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[2:], second[2:])) and torch.equal(first[0], second[0])
    whole = run(p, backend=backend)
    if backend == "triton":  # a library's product may add up in another order where there are fewer rows
        assert torch.equal(first[0], whole[0])
        assert all(torch.equal(first[1][name], whole[1][name]) for name in whole[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_from_above(backend: str, device: torch.device) -> None:
    p = problem("simpo", dtype=torch.float32, device=device)
    room = workspace(p, 14, backend)
    once, more = run(p, backend=backend, workspace_bytes=room), run(p, up=-2.5, backend=backend, workspace_bytes=room)
    assert worst(more[2], once[2] * -2.5) < 1e-6 and worst(more[3], once[3] * -2.5) < 1e-6
    frozen = p.hidden.clone().requires_grad_()
    value, _ = linear_group_loss(frozen, p.weight, p.targets, p.groups(), row_index=p.row_index, backend=backend)
    value.backward()
    assert frozen.grad is not None and worst(frozen.grad, once[2]) < 1e-5 and p.weight.grad is None
    with torch.no_grad():
        plain, _ = linear_group_loss(frozen, p.weight, p.targets, p.groups(), row_index=p.row_index, backend=backend)
    assert plain.grad_fn is None and torch.allclose(plain, once[0], rtol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tied", [False, True])
def test_main_grad(tied: bool, backend: str, device: torch.device) -> None:
    """Two micro-batches on what was there before; the signal to autograd comes in backward; misuse is refused."""
    weight: Any = torch.nn.Parameter(torch.empty(150, 16, device=device))
    weight.main_grad = torch.randn(150, 16, device=device)
    weight.grad_added_to_main_grad = False
    if tied:
        weight.zero_out_wgrad = True
    before, exact = weight.main_grad.double(), torch.zeros(150, 16, dtype=torch.float64, device=device)
    seed = random.SystemRandom().randrange(2**30)
    for rows in (10_000, 14):
        p = problem("dpo", dtype=torch.float32, device=device, seed=seed)
        weight.data.copy_(p.weight)
        hidden = p.hidden.clone().requires_grad_()
        value, _ = linear_group_loss(
            *(hidden, weight, p.targets, p.groups()),
            row_index=p.row_index,
            backend=backend,
            workspace_bytes=workspace(p, rows, backend),
            accumulate="auto",
        )
        assert not weight.grad_added_to_main_grad
        value.backward(retain_graph=True)
        want = p.exact()
        exact += want[3]
        assert worst(hidden.grad, want[2]) < 2e-5  # type: ignore[arg-type]
        assert weight.grad_added_to_main_grad and weight.grad is not None and (not tied or not weight.grad.any())
        with pytest.raises(ConfigError, match="a second backward"):
            value.backward()
        weight.grad, weight.grad_added_to_main_grad = None, False
    assert worst(weight.main_grad.double() - before, exact) < 2e-5
    if device.type == "cpu":
        again = linear_group_loss(
            p.hidden, weight, p.targets, p.groups(), row_index=p.row_index, backend=backend, accumulate="main_grad"
        )[0]
        with pytest.raises(ConfigError, match=r"gradient from above is 0\.5"):
            (again * 0.5).backward()


def test_nothing_at_all_and_responses_in_no_term(device: torch.device) -> None:
    p = problem("sft", dtype=torch.float32, device=device, groups=1)
    none = torch.zeros(0, dtype=torch.int64)
    empty = Problem(
        *("sft", p.hidden, p.weight, p.targets[:0], none, none, p.rewards[:0], p.refs[:0]),
        terms=type(p.terms)(p.terms.members[:0], p.terms.weights[:0], p.terms.group[:0], 0),
    )
    for backend in ("torch", "triton"):
        value, metrics, dh, dw = run(empty, backend=backend)
        assert float(value) == 0 and "nll" in metrics and dh.shape == p.hidden.shape and not dh.any() and not dw.any()


def test_bad_input_is_named(device: torch.device) -> None:
    p = problem("dpo", dtype=torch.float32, device=device)
    counts, sizes = p.blocks.counts, p.blocks.sizes
    with pytest.raises(ConfigError, match=r"blocks\.counts is \[1, "):
        Blocks(counts[:, 1:], sizes)
    with pytest.raises(ConfigError, match=r"blocks\.counts holds -1: a number of targets is not negative"):
        Blocks(counts.clone().fill_(-1), sizes)
    for kind in (torch.float32, torch.bool):
        with pytest.raises(ConfigError, match=f"blocks.counts is {kind}: .* int64 are needed"):
            Blocks(counts.to(kind), sizes)
    for bad in (-1, 1.0, True):
        with pytest.raises(ConfigError, match=f"blocks.sizes holds {bad!r}: "):
            Blocks(counts, (counts.shape[1] - int(bad), bad))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"targets on this rank, targets"):
        run(p, given={"blocks": Blocks(counts + 1, sizes)})
    with pytest.raises(ConfigError, match=r"2 rows for 1 context-parallel ranks"):
        run(p, given={"blocks": Blocks(torch.cat((counts, counts)), sizes)})
    with pytest.raises(ConfigError, match="softcap=-1"):
        run(p, softcap=-1.0)


def test_cuts_are_between_blocks_and_as_few_as_fit() -> None:
    blocks = Blocks(torch.tensor([[3, 2, 4, 1, 9, 1, 1], [1, 1, 1, 7, 0, 0, 2]]), (2, 1, 1, 1, 2))
    assert blocks.cut(100) == [slice(0, 7)]
    assert blocks.cut(9) == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 7)]
    assert blocks.cut(1) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5), slice(5, 7)]
    assert Blocks(torch.zeros(1, 0, dtype=torch.int64), ()).cut(5) == []
