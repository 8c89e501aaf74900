"""Updates that are refused: not finite, or far above what was normal; and what happens then."""

import statistics
from collections import deque
from pathlib import Path
from typing import Any

from megafuse.config.train import GuardConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import BatchPlan
from megafuse.errors import IntegrityError
from megafuse.observe.manifest import read_json, write_json_atomic

INCIDENTS = "incidents"
LEFT_OUT = "left_out.json"


class RollBack(Exception):
    """The run goes back to its newest checkpoint; the batch of `step` is left out on the way forward."""

    def __init__(self, step: int, facts: str) -> None:
        super().__init__(facts)
        self.step = step


class SpikeGuard:
    """Knows the gradient norms of the last accepted updates.

    Its memory is part of the checkpoint: a run that was stopped within a window decides as one that was not.
    """

    def __init__(self, config: GuardConfig, norms: list[float]) -> None:
        self._factor = config.spike_factor
        self._norms: deque[float] = deque(norms, maxlen=config.spike_window)

    def is_spike(self, grad_norm: float) -> bool:
        """More than `spike_factor` times the median of a full window of accepted updates. Never without a factor."""
        if self._factor is None or len(self._norms) < (self._norms.maxlen or 0):
            return False
        return grad_norm > self._factor * statistics.median(self._norms)

    def accept(self, grad_norm: float) -> None:
        """An update with this norm was made."""
        if self._factor is not None:
            self._norms.append(grad_norm)

    @property
    def state(self) -> list[float]:
        """What a checkpoint has to keep."""
        return list(self._norms)


def write_incident(run_dir: Path, step: int, data: GroupDataset, plan: BatchPlan, facts: dict[str, Any]) -> Path:
    """RUN/incidents/step_00000012.json: `facts`, and the prompt ids of the batch by data-parallel rank and row."""
    rows = [[[data[g].prompt_id for g in dict.fromkeys(p.group for p in row)] for row in rank] for rank in plan.rows]
    path = run_dir / INCIDENTS / f"step_{step:08d}.json"
    write_json_atomic(path, {"step": step, **facts, "prompt_ids": rows})
    return path


def left_out(run_dir: Path) -> set[int]:
    """Steps whose batches are left out since a roll-back."""
    path = run_dir / LEFT_OUT
    if not path.is_file():
        return set()
    steps = read_json(path)
    if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
        raise IntegrityError(f"{path} is no list of steps: {steps!r}; restore it, or begin anew in another run_dir")
    return set(steps)


def leave_out(run_dir: Path, step: int) -> None:
    """Add a step to `left_out`."""
    write_json_atomic(run_dir / LEFT_OUT, sorted(left_out(run_dir) | {step}))
