"""One optimizer step: rows through mcore's schedule, the loss over response sums, an update that all ranks agree on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megafuse.data.rows import Row
from megafuse.kernels.logprob import segment_logprobs
from megafuse.losses.registry import Loss
from megafuse.losses.types import ResponseSums
from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `metrics` are exact means over the global batch."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    updated: bool  # False: loss or gradient was not finite, and no rank touched a parameter


@dataclass(frozen=True)
class RowInput:
    """A row on the device, and the reference log-probs of its responses where the loss wants them."""

    row: Row
    ref_logps: Tensor | None  # [n] float64


def forward_rows(model: Any, rows: Sequence[Any], step: Any, *, row_tokens: int, forward_only: bool) -> list[Any]:
    """Run `rows` as micro-batches through the schedule of the current layout; what the last stage returned."""
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(rows),
        model=[model],
        num_microbatches=len(rows),
        seq_length=row_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def run_model(model: Any, row: Row) -> Tensor:
    """Log-probs of the row's response tokens [r] on the last stage, hidden states elsewhere."""
    return model(row.tokens, row.positions, row.layout, row.targets, row.target_rows)


def train_step(
    engine: Engine,
    topology: Topology,
    loss: Loss,
    rows: Sequence[RowInput],
    *,
    row_tokens: int,
    denominator: float,
    progress: float,
) -> StepResult:
    """One update. `denominator` is that of the GLOBAL batch, `progress` the share of the run behind us in [0, 1)."""
    engine.model.zero_grad_buffer()
    engine.optimizer.zero_grad()

    def forward_step(source: Iterator[RowInput], model: Any) -> tuple[Tensor, Any]:
        item = next(source)
        return run_model(model, item.row), partial(_loss, loss, item, denominator, progress)

    outputs = forward_rows(engine.model, rows, forward_step, row_tokens=row_tokens, forward_only=False)
    sums = reduce_metrics(topology, outputs)
    engine.optimizer.prepare_grads()
    grad_norm = float(engine.optimizer.get_grad_norm())
    value = sums.pop("loss")[0]
    finite = topology.all_agree(bool(torch.isfinite(torch.tensor([value, grad_norm])).all()))
    if finite:
        engine.clip(grad_norm)
        engine.optimizer.step_with_ready_grads()
        engine.scheduler.step(1)
    metrics = {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}
    return StepResult(value, grad_norm, metrics, finite)


def _loss(loss: Loss, item: RowInput, denominator: float, progress: float, logps: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Loss of one row: (its part of the global loss, unused token count, metric sums)."""
    row = item.row
    sums, lengths = segment_logprobs(logps, row.target_response, row.num_responses)
    per_group, metrics = loss(ResponseSums(sums, lengths, row.rewards, item.ref_logps), row.terms, progress)
    value = per_group.sum() / denominator
    report = {"loss": torch.stack((value.detach(), torch.ones_like(value))), **metrics}
    return value, torch.zeros((), dtype=torch.int, device=value.device), report


def reduce_metrics(topology: Topology, outputs: list[dict[str, Tensor]]) -> dict[str, tuple[float, float]]:
    """Add (sum, weight) pairs of all rows of all ranks in float64. Every rank gets the same numbers."""
    names = topology.from_last_stage(sorted({name for output in outputs for name in output}))
    total = torch.zeros(len(names), 2, dtype=torch.float64)
    for output in outputs if topology.is_reporter else []:
        total += torch.stack([output[name].double().cpu() for name in names])
    total = topology.sum_over_world(total).cpu()
    return {name: (pair[0].item(), pair[1].item()) for name, pair in zip(names, total)}
