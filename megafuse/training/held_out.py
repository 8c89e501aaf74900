"""The loss and its margin over prompts that are not trained on, through the same pipeline that trains.

The margin is the loss's own: chosen minus rejected implicit reward (`losses._terms.preference_metrics`), averaged over
the groups of the whole data set with the weights of their terms. WRPO's is that of the end of its schedule, so that
checkpoints can be compared.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import BatchPlan, RowPlanner
from megafuse.errors import ConfigError
from megafuse.losses.registry import Loss
from megafuse.parallel.topology import Topology
from megafuse.reference.cache import ReferenceLogps
from megafuse.training.batch import batch_denominator, input_rows
from megafuse.training.step import RowInput, forward_rows, reduce_metrics, row_loss


@dataclass(frozen=True)
class HeldOut:
    """A data set to evaluate on."""

    data: GroupDataset
    planner: RowPlanner
    reference: ReferenceLogps | None
    batch: int
    """Groups of one pass over all ranks; between two, a request to stop is looked at."""


def refuse_trained_prompts(held_out: GroupDataset, trained: GroupDataset) -> None:
    """Raise where a prompt is in both data sets.

    Raises:
        ConfigError: how many, and the first of them.
    """
    both = set(held_out.prompt_ids) & set(trained.prompt_ids)
    if both:
        first = next(name for name in held_out.prompt_ids if name in both)
        raise ConfigError(
            f"held_out.dataset = {held_out.path} shares {len(both)} of its {len(held_out)} prompts with data.dataset = "
            f"{trained.path}, {first!r} the first; leave them out of one of the two"
        )


def evaluate(
    model: list[Any],
    topology: Topology,
    loss: Loss,
    held_out: HeldOut,
    *,
    prefix_sharing: bool,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Means over the data set: `loss` and every metric of the loss; None where any rank's `stop()` became true.

    `model` are the bare chunks. Collective; every rank gets the same numbers. A metric without weight is left out.
    """
    data, sums = held_out.data, dict[str, tuple[float, float]]()
    was_training = model[0].training
    denominator = 0.0
    for chunk in model:
        chunk.eval()
    try:
        for first in range(0, len(data), held_out.batch):
            if not topology.all_agree(not stop()):
                return None
            groups = np.arange(first, min(first + held_out.batch, len(data)))
            plan = held_out.planner.plan(groups)
            denominator += batch_denominator(loss, data, plan)
            outputs = _forward(model, topology, loss, held_out, plan, prefix_sharing)
            for name, (total, weight) in reduce_metrics(topology, outputs).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + weight)
    finally:
        for chunk in model:
            chunk.train(was_training)
    total = sums.pop("loss")[0]
    return {"loss": total / denominator, **{name: t / weight for name, (t, weight) in sums.items() if weight}}


def score(values: dict[str, float]) -> float | None:
    """What checkpoints are compared by, higher is better: the margin, or minus the loss where there is none."""
    value = values["margin"] if "margin" in values else -values["loss"]
    return value if math.isfinite(value) else None


def _forward(
    model: list[Any], topology: Topology, loss: Loss, held_out: HeldOut, plan: BatchPlan, prefix_sharing: bool
) -> list[dict[str, Tensor]]:
    rows = input_rows(topology, held_out.data, plan, held_out.reference, prefix_sharing=prefix_sharing)

    def forward_step(source: Iterator[RowInput], chunk: Any) -> tuple[Any, Any]:
        item = next(source)
        return row_loss(chunk, item, loss, topology, 1.0, 1.0)

    with torch.no_grad():
        outputs: list[dict[str, Tensor]] = forward_rows(
            model, rows, forward_step, lengths=plan.lengths[topology.dp_rank], forward_only=True
        )
    return outputs
