"""Faults to plant in the training code, one at a time: the silent bugs that a parity suite has to notice."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megafuse.config.parity import ParityConfig
from megafuse.data import rows
from megafuse.doctor.parity import Cell, parity_in_processes
from megafuse.kernels import group_loss
from megafuse.kernels._segments import segment_logprobs
from megafuse.losses.registry import Loss
from megafuse.model import attention
from megafuse.training import loop


def _no_context_sum() -> tuple[Any, str, Any]:
    def partial_sums(*args: Any, cp_group: Any = None, **kwargs: Any) -> Any:
        return segment_logprobs(*args, **kwargs)

    return group_loss, "segment_logprobs", partial_sums


def _local_denominator() -> tuple[Any, str, Any]:
    def groups_of_a_row(loss: Loss, data: Any, plan: rows.BatchPlan) -> float:
        return float(len(plan.rows[0][0]) or 1)

    return loop, "batch_denominator", groups_of_a_row


def _parts_as_groups() -> tuple[Any, str, Any]:
    def parts_of_the_batch(loss: Loss, data: Any, plan: rows.BatchPlan) -> float:
        return float(sum(len(row) for rank in plan.rows for row in rank))

    return loop, "batch_denominator", parts_of_the_batch


def _no_segment_mask() -> tuple[Any, str, Any]:
    def causal(
        segment: torch.Tensor, parent: torch.Tensor, places: torch.Tensor, window: Any, keys: torch.Tensor
    ) -> torch.Tensor:
        return places[:, None] >= keys[None, :]

    return attention, "visible", causal


def _running_positions() -> tuple[Any, str, Any]:
    def add(self: Any, tokens: np.ndarray, first_position: int = 0, parent: int | None = None) -> int:
        return int(_true_add(self, tokens, self.length if first_position else 0, parent))

    return rows._RowBuilder, "add", add


def _no_weights() -> tuple[Any, str, Any]:
    def unweighted(self: Loss, sums: Any, terms: Any, progress: float) -> Any:
        return _true_call(self, sums, replace(terms, weights=torch.ones_like(terms.weights)), progress)

    return Loss, "__call__", unweighted


_true_add = rows._RowBuilder.add
_true_call = Loss.__call__
MUTATIONS: dict[str, Callable[[], tuple[Any, str, Any]]] = {
    "context sum dropped": _no_context_sum,
    "denominator of one row": _local_denominator,
    "parts counted as groups": _parts_as_groups,
    "segment mask dropped": _no_segment_mask,
    "positions not restarted": _running_positions,
    "weights dropped": _no_weights,
}
"""Name -> (owner, attribute, what stands there instead)."""


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The fault `name` of MUTATIONS, inside this block."""
    owner, attribute, wrong = MUTATIONS[name]()
    right = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    try:
        yield
    finally:
        setattr(owner, attribute, right)


def parity_with_faults(config: ParityConfig, faults: dict[str, str]) -> dict[str, list[Cell]]:
    """Cells of `config` at the layout `faults[name]` with each named fault planted in turn; and without, under ''."""
    found = {"": parity_in_processes(config)}
    for name, layout in faults.items():
        with planted(name):
            found[name] = parity_in_processes(config.model_copy(update={"layouts": (layout,)}))
    return found
