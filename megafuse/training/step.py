"""One optimizer step: rows through mcore's schedule, the loss over response sums, an update that all ranks agree on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megafuse.data.rows import Row
from megafuse.kernels.group_loss import GroupLoss
from megafuse.losses.registry import Loss
from megafuse.losses.types import ResponseSums
from megafuse.parallel.host_memory import give_back_freed_memory
from megafuse.parallel.topology import Topology
from megafuse.training.grad_norms import grad_norms, total_norm
from megafuse.training.optim import Engine

LARGEST = torch.finfo(torch.float32).max
Outputs = list[dict[str, Tensor]]  # of the last stage's rows: metric name -> (sum, weight)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `metrics` are exact means over the global batch."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    updated: bool  # False: refused, and no rank touched a parameter
    finite: bool = True  # loss and gradient norm, on every rank
    stop: int = 0  # the strongest request to stop that any rank has had
    grad_norms: dict[str, float] = field(default_factory=dict)  # by part of the model, see training.grad_norms


@dataclass(frozen=True)
class RowInput:
    """A row on the device, and the reference log-probs of its responses where the loss wants them."""

    row: Row
    ref_logps: Tensor | None  # [n] float64


def forward_rows(
    model: list[Any], rows: Sequence[Any], step: Any, *, lengths: Sequence[int], forward_only: bool
) -> Any:
    """Run `rows`, of `lengths` places, as micro-batches through the current layout's schedule; the last stage's list.

    `model` holds this rank's chunks: one, or those of a virtual pipeline, each of which sees all the rows.
    """
    # all stages of a replica have the same rows, so they agree whether shapes have to be told first
    get_model_config(model[0]).variable_seq_lengths = len(set(lengths)) > 1
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in model] if len(model) > 1 else iter(rows),
        model=model,
        num_microbatches=len(rows),
        seq_length=lengths[0],
        micro_batch_size=1,
        forward_only=forward_only,
    )


def run_model(model: Any, row: Row, groups: GroupLoss | None = None) -> Any:
    """What `FusionGPT` gives for a row: on the last stage log-probs [r] of the response tokens that this rank's places
    predict, or with `groups` (loss, report); hidden states before it.
    """
    return model(row.tokens, row.positions, row.layout, row.targets, row.target_rows, groups)


def train_step(
    engine: Engine,
    topology: Topology,
    loss: Loss,
    rows: Sequence[RowInput],
    *,
    lengths: Sequence[int],
    denominator: float,
    progress: float,
    refuse: Callable[[float], bool] = lambda grad_norm: False,
    stop: Callable[[], int] = lambda: 0,
    check: Callable[[Outputs, Callable[[], Outputs]], Outputs] = lambda outputs, again: outputs,
) -> StepResult:
    """One update from this rank's `rows`, of `lengths` places.

    `denominator` is that of the GLOBAL batch, `progress` the share of the run behind us in [0, 1). An update that is
    not finite, or that any rank's `refuse(grad_norm)` is true for, is made by no rank. `stop()` says how urgently this
    rank is asked to stop; all ranks learn of the strongest request in the same all-reduce. `check` sees what came of
    forward and backward, and what computes them again.
    """
    once = partial(backward, engine, topology, loss, rows, lengths=lengths, denominator=denominator, progress=progress)
    sums = reduce_metrics(topology, check(once(), once))
    engine.optimizer.prepare_grads()
    norms = grad_norms(engine, topology)
    grad_norm = total_norm(norms)
    value = sums.pop("loss")[0]
    # as megatron-core's fp32 norm refuses: AdamW's squares of such gradients, unless they are clipped, do not fit fp32
    whole = abs(value) <= LARGEST and grad_norm * grad_norm <= LARGEST  # NaN is not
    votes = topology.least(float(whole), float(not refuse(grad_norm)), -float(stop()))
    finite, wanted, stopping = votes[0] > 0, votes[1] > 0, -int(votes[2])
    if finite and wanted:
        engine.clip(grad_norm)
        engine.optimizer.step_with_ready_grads()
        engine.scheduler.step(1)
    metrics = {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}
    return StepResult(value, grad_norm, metrics, finite and wanted, finite, stopping, norms)


def backward(
    engine: Engine,
    topology: Topology,
    loss: Loss,
    rows: Sequence[RowInput],
    *,
    lengths: Sequence[int],
    denominator: float,
    progress: float,
) -> Outputs:
    """Gradients of one global batch, summed over all ranks, in the parameters' `main_grad`; the rows' metric sums."""
    give_back_freed_memory()  # what the last update needed beside its state: activations come now
    for chunk in engine.model:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()

    def forward_step(source: Iterator[RowInput], model: Any) -> tuple[Any, Any]:
        item = next(source)
        return row_loss(model, item, loss, topology, denominator, progress)

    return forward_rows(engine.model, rows, forward_step, lengths=lengths, forward_only=False)


def row_loss(
    model: Any, item: RowInput, loss: Loss, topology: Topology, denominator: float, progress: float
) -> tuple[Any, Callable[[Any], Any]]:
    """What mcore's schedule wants of a row: (the model's output, what makes (loss, token count, metric sums) of it)."""
    groups = GroupLoss(
        partial(_loss, loss, item, denominator, progress),
        item.row.blocks,
        topology.cp_group,
        vanishes=loss.vanishes or item.row.idle,
    )
    return run_model(model, item.row, groups), _as_mcore_wants_it


def _loss(
    loss: Loss, item: RowInput, denominator: float, progress: float, sums: Tensor, lengths: Tensor, part: slice
) -> tuple[Tensor, Any]:
    """Loss of the responses `part` of one row: (its share of the global loss, metric sums).

    Context-parallel ranks have completed the sums before anything nonlinear sees them. Each then has the whole loss,
    and the gradient with respect to its own tokens only; the sum over ranks that DDP takes is the whole gradient.
    """
    row, terms = item.row, item.row.terms
    if part.stop - part.start < row.num_responses:  # a term's responses are all of the part, or none is
        last = terms.members.amax(1)
        inside = (last >= part.start) & (last < part.stop)
        terms = replace(terms, weights=torch.where(inside, terms.weights, 0))
    per_group, metrics = loss(ResponseSums(sums, lengths, row.rewards, item.ref_logps), terms, progress)
    value = per_group.sum() / denominator
    return value, {"loss": torch.stack((value.detach(), torch.ones_like(value))), **metrics}


def _as_mcore_wants_it(output: tuple[Tensor, Any]) -> tuple[Tensor, Tensor, Any]:
    """(loss, unused token count, metric sums) of what the last stage gave for a row."""
    value, report = output
    return value, torch.zeros((), dtype=torch.int, device=value.device), report


def reduce_metrics(topology: Topology, outputs: Outputs) -> dict[str, tuple[float, float]]:
    """Add (sum, weight) pairs of all rows of all ranks in float64. Every rank gets the same numbers."""
    names = topology.from_last_stage(sorted({name for output in outputs for name in output}))
    total = torch.zeros(len(names), 2, dtype=torch.float64, device=topology.device)
    for output in outputs if topology.is_reporter else []:
        total += torch.stack([output[name].to(total) for name in names])
    return {name: (sums, weight) for name, (sums, weight) in zip(names, topology.sum_over_world(total).tolist())}
