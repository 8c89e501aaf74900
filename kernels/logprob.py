"""Per-token log-probs under a large, possibly tensor-parallel vocabulary, and their sums per response.

Numerics: products, logits and every operation on them are float32, also where the operands are bfloat16 or float16: no
logit is rounded. float64 inputs stay float64 throughout and serve as the oracle. Log-probs never exceed 0. In backward
the logits' gradient is rounded once to the dtype of the operands. More, also on the backends: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.errors import ConfigError, DataError
from megafuse.kernels._arguments import INDEX_TYPES, check_targets, check_tensors, make_head, owned_somewhere, whole
from megafuse.kernels._linear_autograd import LinearLogprobs, rows_of
from megafuse.kernels._linear_parts import LinearOptions, RowMap
from megafuse.kernels._logprob_torch import VocabParallelLogprobs
from megafuse.kernels._segments import segment_logprobs
from megafuse.kernels._vocab_softmax import compute_dtype
from megafuse.kernels.backend import choose

__all__ = ["linear_logprobs", "linear_logprobs_and_entropy", "segment_logprobs", "vocab_parallel_logprobs"]

ACCUMULATE = ("grad", "main_grad", "auto")


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probs [T] float32 of `targets [T]` (global ids) under `logits [T, V_local]`.

    This rank's columns are the ids `vocab_start ...`; `group` holds the other ranks' (shards may be uneven, even
    empty). Ids from `vocab_size` on are padding: outside the softmax, with gradient 0. Logits become
    `softcap * tanh(logits / softcap) / temperature` first. One all_gather of [3, T] forward, none backward.
    Shards that overlap (a forgotten `vocab_start`) are a ConfigError on a CPU, and make every log-prob NaN on CUDA.
    `inplace_backward` writes the gradient into the memory of `logits`: a second backward is then refused by autograd.

    Raises ConfigError on options or shapes that cannot work, DataError on a target outside the vocabulary. Targets are
    only looked at on a CPU; on CUDA, where looking would stop the device, such a target has log-prob -inf. `backend`:
    see `megafuse.kernels.backend.choose`.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ConfigError(f"logits {list(logits.shape)} must be [T, V] and targets {list(targets.shape)} [T]")
    check_tensors(logits=logits, targets=targets)
    head = make_head(logits.shape[1], vocab_start, vocab_size, group, temperature, softcap)
    check_targets(targets, head, vocab_size)
    if choose(backend, logits.device, logits.dtype) == "triton":
        if logits.numel() and logits.stride(1) != 1:
            raise ConfigError(f"logits have strides {logits.stride()}: the vocabulary must be contiguous (stride 1)")
        from megafuse.kernels._logprob_triton import TritonVocabParallelLogprobs

        logp = TritonVocabParallelLogprobs.apply(logits, targets, head, inplace_backward)
    else:
        logp = VocabParallelLogprobs.apply(logits, targets, head, inplace_backward)
    return owned_somewhere(logp, targets, head)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_index: Tensor | None = None,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = 1 << 30,
    backend: str = "auto",
    vocab_size: int | None = None,
    accumulate: str = "grad",
) -> Tensor:
    """Log-probs [T] float32 of `targets [T]` under the logits `hidden @ weight.T`, which are never all in memory.

    `hidden [T_h, H]` is the same on all ranks of `tp_group`, or, with `sequence_parallel`, this rank's T_h / tp rows of
    the sequence. `weight [V_local, H]` holds the ids `vocab_start ...`. `row_index [T]` names the row of the whole
    sequence that predicts each target (default: row t predicts target t), and rows may repeat. It is needed on the
    host: pass it on the CPU, or a CUDA stream is waited for.

    At most `workspace_bytes` of logits (`torch`) or of their exponentials (`triton`) exist at once, one row at least.
    What fits is kept for backward, the rest is computed again; without a gradient to come, `triton` keeps none.
    Gradients: `hidden` is summed over `tp_group` in float32 (all-reduce, or reduce-scatter with `sequence_parallel`);
    `weight` accumulates in float32 over the chunks and is rounded once. A call without targets takes part in every
    collective and gives zero gradients.

    `accumulate` says where the weight's gradient goes: "grad" returns it to autograd; "main_grad" adds it in float32
    to `weight.main_grad` and sets `weight.grad_added_to_main_grad`, megatron-core's protocol, right for tied embeddings
    (`weight.zero_out_wgrad`) and earlier micro-batches; "auto" does so if the weight has both attributes.

    Other arguments and errors: see `vocab_parallel_logprobs`. DataError also on a `row_index` outside the sequence,
    ConfigError on `accumulate="main_grad"` without a float32 `main_grad` of the weight's shape.
    """
    return _linear(
        hidden,
        weight,
        targets,
        entropy=False,
        row_index=row_index,
        vocab_start=vocab_start,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        temperature=temperature,
        softcap=softcap,
        workspace_bytes=workspace_bytes,
        backend=backend,
        vocab_size=vocab_size,
        accumulate=accumulate,
    )[0]


def linear_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` and, from the same product, the entropy [T] in nats of the distribution behind each target.

    The entropy is a measurement, without a gradient: `detach()` it where it is recorded. A backward that reaches it
    raises ConfigError. Options and other errors: those of `linear_logprobs`.
    """
    return _linear(hidden, weight, targets, entropy=True, **options)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool,
    row_index: Tensor | None = None,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = 1 << 30,
    backend: str = "auto",
    vocab_size: int | None = None,
    accumulate: str = "grad",
) -> tuple[Tensor, Tensor]:
    """(log-probs [T], entropies [T] or [0])."""
    options, chosen = prepare(
        *(hidden, weight, targets, entropy, row_index, vocab_start, tp_group, sequence_parallel),
        *(temperature, softcap, workspace_bytes, backend, vocab_size, accumulate),
    )
    logp, entropies = LinearLogprobs.apply(hidden, weight, targets, options, rows_of(chosen))
    return owned_somewhere(logp, targets, options.head), entropies


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entropy: bool,
    row_index: Tensor | None,
    vocab_start: int,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    backend: str,
    vocab_size: int | None,
    accumulate: str,
) -> tuple[LinearOptions, Literal["torch", "triton"]]:
    """The arguments of `linear_logprobs`, checked (see there for the errors), and the backend that will run."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.ndim != 1:
        raise ConfigError(
            f"hidden {list(hidden.shape)} must be [T_h, H], weight {list(weight.shape)} [V, H], "
            f"targets {list(targets.shape)} [T]"
        )
    if hidden.dtype != weight.dtype:
        raise ConfigError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: cast one of them")
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if hidden.shape[1] == 0:
        raise ConfigError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} have width H = 0: at least 1 is needed"
        )
    workspace_bytes = whole("workspace_bytes", workspace_bytes, 1)
    head = make_head(weight.shape[0], vocab_start, vocab_size, tp_group, temperature, softcap)
    check_targets(targets, head, vocab_size)
    sequence = hidden.shape[0] * (head.group.size() if sequence_parallel and head.group is not None else 1)
    rows = row_map(row_index, targets, sequence, hidden.device)
    main_grad = _into_main_grad(weight, accumulate)
    chosen = choose(backend, hidden.device, hidden.dtype)
    if chosen == "triton" and weight.numel() and weight.stride(1) != 1:
        raise ConfigError(f"weight has strides {weight.stride()}: its rows must be contiguous (stride 1)")
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearOptions(head, rows, sequence_parallel, workspace_bytes, entropy, main_grad, gradient), chosen


def _into_main_grad(weight: Tensor, accumulate: str) -> bool:
    """Whether the weight's gradient is added to `weight.main_grad`."""
    if accumulate not in ACCUMULATE:
        raise ConfigError(f"accumulate={accumulate!r} is not known: use one of {', '.join(ACCUMULATE)}")
    if accumulate == "grad":
        return False
    main_grad = getattr(weight, "main_grad", None)
    if accumulate == "auto" and (main_grad is None or not hasattr(weight, "grad_added_to_main_grad")):
        return False
    if main_grad is None:
        raise ConfigError("accumulate='main_grad', but weight has no attribute main_grad: use accumulate='grad'")
    wide = compute_dtype(weight)
    if main_grad.shape != weight.shape or main_grad.dtype != wide or main_grad.device != weight.device:
        found = f"{list(main_grad.shape)} {main_grad.dtype} on {main_grad.device}"
        if accumulate == "auto":
            return False
        raise ConfigError(f"weight.main_grad is {found}: {list(weight.shape)} {wide} on {weight.device} is needed")
    return True


def row_map(row_index: Tensor | None, targets: Tensor, sequence: int, device: torch.device) -> RowMap:
    """Distinct rows of the `sequence` hidden rows that predict the targets. Errors: see `linear_logprobs`."""
    if row_index is None:
        if targets.shape[0] != sequence:
            raise ConfigError(f"{targets.shape[0]} targets for {sequence} hidden rows: pass row_index")
        return RowMap(None, None, None, sequence)
    if row_index.shape != targets.shape:
        raise ConfigError(f"row_index {list(row_index.shape)} must have the shape of targets {list(targets.shape)}")
    if row_index.dtype not in INDEX_TYPES:  # a mask would be read as rows 0 and 1
        raise ConfigError(f"row_index is {row_index.dtype}: int64 or int32 is needed (of a mask: nonzero()[:, 0])")
    rows, inverse = torch.unique(row_index.detach().to("cpu", torch.int64), return_inverse=True)
    if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < sequence:
        bad = int(rows[0]) if int(rows[0]) < 0 else int(rows[-1])
        raise DataError(f"row_index holds {bad}, outside the {sequence} hidden rows")
    order = torch.arange(inverse.numel())
    first = torch.zeros_like(rows).scatter_reduce_(0, inverse, order, "amin", include_self=False)
    index = None if rows.numel() == sequence else rows.to(device, non_blocking=True)
    if rows.numel() == inverse.numel() and torch.equal(inverse, order):
        return RowMap(index, None, None, rows.numel())
    return RowMap(index, inverse.to(device, non_blocking=True), first.to(device, non_blocking=True), rows.numel())
