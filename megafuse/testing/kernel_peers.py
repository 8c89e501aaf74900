"""Who can compute per-token log-probs of a large vocabulary: our backends and the libraries that are installed.

For the kernel benchmark. A provider is called with `Operands` and returns the log-probs of the response tokens [R], or
a scalar loss where that is all it offers (`mean_only`). Peers are imported when asked for, never required.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """A model's head."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


SHAPES = (
    Shape("llama-3-8b", 4096, 128256),
    Shape("gemma-2-9b", 3584, 256000, softcap=30.0),
    Shape("qwen2.5-7b", 3584, 152064),
    Shape("smollm2", 576, 49152),
)


@dataclass
class Operands:
    """One set of inputs; `rows [R]` (CPU) are the response tokens among the T rows of hidden.

    What is on the device is there before a call is timed: a copy from the host's memory waits for the device, so that
    what the host does would count as the peer's time. `rows` are for this package, which looks at them on the host.
    """

    shape: Shape
    hidden: Tensor  # [T, H], requires grad
    weight: Tensor  # [V, H], requires grad
    targets: Tensor  # [R] int64
    labels: Tensor  # [T] int64, IGNORE outside the response
    rows: Tensor  # [R] int64 on the CPU
    device_rows: Tensor  # [R] the same, on hidden's device
    device_responses: Tensor  # [R] int64 on hidden's device: the response of each, cut by `response_lengths`
    grad: Tensor  # [R] float32: what a preference loss sends back
    logits: Tensor | None = None  # [R, V], for the level of logits


@dataclass(frozen=True)
class Provider:
    """A way to do it."""

    name: str
    level: str  # "logits" or "linear"
    call: Callable[[Operands], Tensor]
    mean_only: bool = False  # returns the mean loss: another backward, with one coefficient for all tokens
    softcap: bool = True  # can apply the soft cap inside
    backward: bool = True


def ours(backend: str) -> Iterator[Provider]:
    """This package's functions."""
    from megafuse.kernels.logprob import linear_logprobs, vocab_parallel_logprobs

    def logits(o: Operands) -> Tensor:
        assert o.logits is not None
        return vocab_parallel_logprobs(
            o.logits, o.targets, softcap=o.shape.softcap, inplace_backward=True, backend=backend
        )

    def linear(o: Operands) -> Tensor:
        return linear_logprobs(
            o.hidden, o.weight, o.targets, row_index=o.rows, softcap=o.shape.softcap, backend=backend
        )

    yield Provider(f"megafuse-{backend}", "logits", logits)
    yield Provider(f"megafuse-{backend}", "linear", linear)


RESPONSE_TOKENS = 512  # of a response of the preference loss, about


def response_lengths(tokens: int) -> list[int]:
    """Nearly equal lengths of an even number of responses."""
    count = 2 * max(round(tokens / (2 * RESPONSE_TOKENS)), 1)
    return [tokens * (i + 1) // count - tokens * i // count for i in range(count)]


def preference(backend: str) -> Iterator[Provider]:
    """SimPO on pairs of responses, with the loss inside the head's loop, and behind the log-probs of the whole row."""
    from megafuse.config.loss import LossConfig
    from megafuse.kernels.group_loss import Blocks, GroupLoss, linear_group_loss
    from megafuse.kernels.logprob import linear_logprobs, segment_logprobs
    from megafuse.losses.registry import make_loss
    from megafuse.losses.types import ResponseSums, Terms

    loss = make_loss(LossConfig(name="simpo", beta=2.0, gamma=0.5))

    def value(sums: Tensor, lengths: Tensor, part: slice) -> tuple[Tensor, Any]:
        pairs = (part.stop - part.start) // 2
        number = torch.arange(pairs, device=sums.device)
        terms = Terms(torch.arange(2 * pairs, device=sums.device).view(-1, 2), torch.ones_like(number), number, pairs)
        given = ResponseSums(sums[part], lengths[part], torch.zeros_like(sums[part]), None)
        losses, metrics = loss(given, replace(terms, weights=terms.weights.float()), 0.0)
        return losses.mean(), metrics

    def inside(o: Operands) -> Tensor:
        lengths = torch.tensor([response_lengths(len(o.targets))])
        groups = GroupLoss(value, Blocks(lengths, (2,) * (lengths.shape[1] // 2)), vanishes=False)
        options: dict[str, Any] = {"row_index": o.rows, "softcap": o.shape.softcap, "backend": backend}
        return linear_group_loss(o.hidden, o.weight, o.targets, groups, **options)[0]

    def behind(o: Operands) -> Tensor:
        logp = linear_logprobs(
            o.hidden, o.weight, o.targets, row_index=o.rows, softcap=o.shape.softcap, backend=backend
        )
        count = len(response_lengths(len(o.targets)))
        return value(*segment_logprobs(logp, o.device_responses, count), slice(0, count))[0]

    yield Provider(f"megafuse-{backend}-simpo", "linear", inside, mean_only=True)
    yield Provider(f"megafuse-{backend}-simpo-apart", "linear", behind, mean_only=True)


def prediction(shape: Shape, rows: int, workspace_bytes: int = 1 << 30) -> dict[str, float]:
    """Arithmetic, nothing measured: products of [rows, H] x [V, H] that a preference loss takes, and its workspace.

    `inside` with the loss in the head's loop (`linear_group_loss`), `apart` behind `linear_logprobs`; chunks of pairs.
    """
    from megafuse.kernels._linear_triton import Tiles, TritonRows, cut, row_stride
    from megafuse.kernels.group_loss import Blocks

    weight = torch.empty((shape.vocab, shape.hidden), dtype=torch.bfloat16, device="meta")
    fit = TritonRows.fit(weight, workspace_bytes)
    counts = torch.tensor([response_lengths(rows)])
    runs = [int(counts[0, run].sum()) for run in Blocks(counts, (2,) * (counts.shape[1] // 2)).cut(fit)]
    last = cut(rows, fit, Tiles.bm)[-1]
    lost = sum(max(run - fit, 0) for run in runs)
    return {
        "chunks": len(runs),
        "products_inside": 3 + lost / rows,
        "products_apart": 3 + (rows - (last.stop - last.start)) / rows,
        "workspace_gb": min(max(runs), fit) * row_stride(shape.vocab) * 2 / 1e9,
        "product_tflop": 2 * rows * shape.hidden * shape.vocab / 1e12,
    }


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager(compiled: bool) -> Iterator[Provider]:
    """log_softmax and gather in float32, as the reference implementations of most trainers do."""

    def gather(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        return _cap(logits.float(), softcap).log_softmax(1).gather(1, targets[:, None]).squeeze(1)

    def project(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        return gather(hidden @ weight.t(), targets, softcap)

    name = "torch-compile" if compiled else "torch-eager"
    gather_, project_ = (torch.compile(gather), torch.compile(project)) if compiled else (gather, project)

    def logits(o: Operands) -> Tensor:
        assert o.logits is not None
        return gather_(o.logits, o.targets, o.shape.softcap)

    def linear(o: Operands) -> Tensor:
        return project_(o.hidden[o.device_rows], o.weight, o.targets, o.shape.softcap)

    yield Provider(name, "logits", logits)
    yield Provider(name, "linear", linear)


def torch_linear_cross_entropy() -> Iterator[Provider]:
    """torch.nn.functional.linear_cross_entropy, from torch 2.13."""
    function = torch.nn.functional.linear_cross_entropy

    def linear(o: Operands) -> Tensor:
        return -function(o.hidden[o.device_rows], o.weight, o.targets, reduction="none")

    yield Provider("torch-linear-ce", "linear", linear, softcap=False)


def liger() -> Iterator[Provider]:
    """Liger's fused linear cross entropy (mean loss), with its default and with float32 accumulation."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    for name, more in (("liger-flce", {}), ("liger-flce-fp32", {"accum_dtype": torch.float32})):
        for cap in (None, 30.0):
            loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, softcap=cap, **more)

            def linear(o: Operands, loss: Any = loss, cap: float | None = cap) -> Tensor:
                if o.shape.softcap != cap:
                    raise NotSupported("made for the other soft cap")
                return loss(o.weight, o.hidden, o.labels)

            yield Provider(f"{name}-cap" if cap else name, "linear", linear, mean_only=True)


def liger_preference() -> Iterator[Provider]:
    """Liger's chunked preference losses: halves of the tokens are chosen and rejected, one sequence a group."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearSimPOLoss

    losses = {
        "liger-dpo": LigerFusedLinearDPOLoss(use_ref_model=False),
        "liger-simpo": LigerFusedLinearSimPOLoss(),
    }
    for name, loss in losses.items():

        def linear(o: Operands, loss: Any = loss) -> Tensor:
            length = 1024 if o.hidden.shape[0] % 2048 == 0 else o.hidden.shape[0] // 2
            return loss(o.weight, o.hidden.view(-1, length, o.shape.hidden), o.labels.view(-1, length))[0]

        yield Provider(name, "linear", linear, mean_only=True, softcap=False)


def cut_cross_entropy() -> Iterator[Provider]:
    """Apple's cut cross-entropy; `cce_exact` does not skip small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    for impl in ("cce", "cce_exact"):

        def linear(o: Operands, impl: str = impl) -> Tensor:
            return -linear_cross_entropy(
                o.hidden[o.device_rows], o.weight, o.targets, softcap=o.shape.softcap, reduction="none", impl=impl
            )

        yield Provider(impl, "linear", linear)


def quack() -> Iterator[Provider]:
    """Quack's cross entropy on logits (gradient in place), and its chunked loss of hidden states (mean loss)."""
    from quack.cross_entropy import cross_entropy
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def logits(o: Operands) -> Tensor:
        assert o.logits is not None
        return -cross_entropy(o.logits, o.targets, reduction="none", inplace_backward=True)

    def linear(o: Operands) -> Tensor:
        if len(o.device_rows) % 8:
            raise NotSupported("quack's chunks want a multiple of 8 tokens")
        return chunked_linear_cross_entropy(o.hidden[o.device_rows], o.weight, o.targets)

    yield Provider("quack", "logits", logits, softcap=False)
    yield Provider("quack", "linear", linear, mean_only=True, softcap=False)


def trl() -> Iterator[Provider]:
    """TRL's selective log-softmax."""
    from trl.trainer.utils import selective_log_softmax

    def logits(o: Operands) -> Tensor:
        assert o.logits is not None
        return selective_log_softmax(_cap(o.logits, o.shape.softcap), o.targets)

    yield Provider("trl-selective", "logits", logits)


def transformer_engine() -> Iterator[Provider]:
    """Transformer Engine's Triton cross entropy."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def logits(o: Operands) -> Tensor:
        assert o.logits is not None
        return -parallel_cross_entropy(o.logits[None], o.targets[None], 0.0, False, None)[0]

    yield Provider("transformer-engine", "logits", logits, softcap=False)


def megatron() -> Iterator[Provider]:
    """Megatron's fused and unfused vocabulary-parallel cross entropy, in a tensor-parallel world of one."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not parallel_state.model_parallel_is_initialized():
        raise NotSupported("mcore's parallel state is not initialised")
    group = parallel_state.get_tensor_model_parallel_group()

    def fused(o: Operands) -> Tensor:
        assert o.logits is not None
        return -fused_vocab_parallel_cross_entropy(o.logits[:, None], o.targets[:, None], group)[:, 0]

    def unfused(o: Operands) -> Tensor:
        assert o.logits is not None
        return -vocab_parallel_cross_entropy(o.logits[:, None].float(), o.targets[:, None])[:, 0]

    yield Provider("megatron-fused", "logits", fused, softcap=False)
    yield Provider("megatron", "logits", unfused, softcap=False)


class NotSupported(Exception):
    """This provider cannot do this case; the message says why."""


def available() -> tuple[list[Provider], dict[str, str]]:
    """(providers that can be imported here, what is absent and why)."""
    sources: dict[str, Callable[[], Iterator[Provider]]] = {
        "megafuse-triton": lambda: ours("triton"),
        "megafuse-torch": lambda: ours("torch"),
        "megafuse-triton-simpo": lambda: preference("triton"),
        "megafuse-torch-simpo": lambda: preference("torch"),
        "torch-eager": lambda: eager(False),
        "torch-compile": lambda: eager(True),
        "torch-linear-ce": torch_linear_cross_entropy,
        "liger": liger,
        "liger-preference": liger_preference,
        "cut-cross-entropy": cut_cross_entropy,
        "quack": quack,
        "trl": trl,
        "transformer-engine": transformer_engine,
        "megatron": megatron,
    }
    found: list[Provider] = []
    absent: dict[str, str] = {}
    for name, source in sources.items():
        try:
            found += list(source())
        except Exception as error:  # what a library of another year raises on being imported is anyone's guess
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent
