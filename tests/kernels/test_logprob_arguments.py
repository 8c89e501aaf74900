"""Arguments that the log-prob functions refuse, alike in both backends, and numbers at the edge of 32 bits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megafuse.errors import ConfigError, DataError
from megafuse.kernels._logprob_torch import _Chunks
from megafuse.kernels._vocab_softmax import Head
from megafuse.kernels.backend import interpreted
from megafuse.kernels.group_loss import Blocks, GroupLoss, linear_group_loss
from megafuse.kernels.logprob import linear_logprobs, vocab_parallel_logprobs


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def needs(backend: str) -> None:
    """Skip where `backend` cannot take tensors on a CPU."""
    if backend == "triton":
        pytest.importorskip("triton")
        if not interpreted():
            pytest.skip("Triton was imported without TRITON_INTERPRET=1")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocab_size", [None, 120, 200])
def test_targets_beyond_the_columns_whatever_vocab_size_says(vocab_size: int | None, backend: str) -> None:
    needs(backend)
    hidden, weight = leaf(4, 16), leaf(120, 16)
    groups = GroupLoss(lambda sums, *_: (sums.sum(), {}), Blocks(torch.tensor([[3, 1]]), (1, 1)))
    for bad in (120, 150):
        targets = torch.tensor([0, 119, bad, 7])
        options: dict[str, Any] = {"vocab_size": vocab_size, "backend": backend}
        for call in (
            lambda ids, kinds: linear_logprobs(hidden, weight, ids, **kinds),
            lambda ids, kinds: vocab_parallel_logprobs(hidden @ weight.t(), ids, **kinds),
            lambda ids, kinds: linear_group_loss(hidden, weight, ids, groups, **kinds),
        ):
            with pytest.raises(DataError, match=f"target id {bad} .* vocabulary of 120 ids .* correct targets"):
                call(targets, options)
            call(targets.clamp(max=119), options)


HUGE, NAN, INF = 1e300, float("nan"), float("inf")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (INF, NAN, -1.0, 0.0, HUGE, 1e-300, "1")),
        ("softcap", (INF, NAN, -1.0, 0.0, HUGE, 1e-300, "1")),
        ("workspace_bytes", (NAN, INF, 0, -1, 1.5, True, "1")),
        ("vocab_size", (0, -3, 2.5, NAN, True)),
        ("vocab_start", (-1, 0.5, NAN)),
    ],
)
def test_numbers_that_cannot_work_are_refused(name: str, values: tuple[Any, ...], backend: str) -> None:
    needs(backend)
    hidden, weight = leaf(4, 16), leaf(20, 16)
    targets = torch.tensor([3, 1, 0, 2])
    for value in values:
        options: dict[str, Any] = {name: value, "backend": backend}
        match = re.escape(f"{name}={value!r} must be a ")
        with pytest.raises(ConfigError, match=match):
            linear_logprobs(hidden, weight, targets, **options)
        if name != "workspace_bytes":
            with pytest.raises(ConfigError, match=match):
                vocab_parallel_logprobs(hidden @ weight.t(), targets, **options)


@pytest.mark.bits
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_whole_floats_are_whole_numbers_and_odd_tensors_are_refused(backend: str) -> None:
    needs(backend)
    hidden, weight = leaf(4, 16), leaf(20, 16)
    targets = torch.tensor([3, 1, 0, 2])
    options: dict[str, Any] = {"backend": backend}
    want = linear_logprobs(hidden, weight, targets, workspace_bytes=10**6, vocab_size=19, **options)
    got = linear_logprobs(hidden, weight, targets, workspace_bytes=1e6, vocab_size=19.0, **options)  # type: ignore[arg-type]
    assert torch.equal(got, want)
    got.sum().backward()
    small = [t.detach().to(torch.float8_e4m3fn) for t in (hidden, weight)]
    with pytest.raises(ConfigError, match=r"hidden is torch\.float8_e4m3fn: cast it to bfloat16"):
        linear_logprobs(*small, targets, **options)
    with pytest.raises(ConfigError, match=r"logits is torch\.float8_e4m3fn: cast it to bfloat16"):
        vocab_parallel_logprobs(small[0], targets, **options)
    with pytest.raises(ConfigError, match=r"hidden \[4, 0\] .* width H = 0: at least 1"):
        linear_logprobs(hidden[:, :0], weight[:, :0], targets, **options)


def test_offsets_of_targets_do_not_wrap_at_2_to_the_31() -> None:
    """Four rows of 2^30 logits would be 16 GB: only the arithmetic on their places is run, with 32-bit targets."""
    targets = torch.tensor([2**30 - 1, 5, 7], dtype=torch.int32)
    x, weight, row = torch.zeros(4, 1), torch.zeros(1, 1).expand(2**30, 1), torch.tensor([3, 2, 9])
    chunks = _Chunks(x, weight, Head(0, 2**30, 1.0, None, None), 1 << 40)
    assert chunks.slots(0, 4, row, targets).tolist() == [2**32 - 1, 2**31 + 5, 2**32]
