"""The measuring loop: the steps of training itself, between barriers, on a device that has nothing left to do."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megafuse.bench.breakdown import PARTS, Timeline, instrumented
from megafuse.bench.memory import peak_bytes, reset_peak
from megafuse.bench.synthetic import SyntheticGroups
from megafuse.data.parts import groups_of
from megafuse.data.rows import BatchPlan, RowPlanner, build_row
from megafuse.data.shard import local_row
from megafuse.data.types import Part
from megafuse.errors import NonFiniteError
from megafuse.losses.registry import Loss
from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine
from megafuse.training.step import RowInput, StepResult, train_step


@dataclass(frozen=True)
class Measurement:
    """What the steps of one kind (a number of sources, with or without prefix sharing) took."""

    plan: BatchPlan
    responses: int  # of a step, over all ranks
    step_seconds: list[float]  # measured steps, in order; a step takes as long as its slowest rank
    peak_memory: int  # bytes, of the rank that needed most
    memory_kind: str
    breakdown: dict[str, float] | None  # seconds of each part, mean over ranks

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Stepper:
    """A training step on all of `groups`, as `megafuse train` does it: plan, rows, forward, backward, update."""

    engine: Engine
    topology: Topology
    loss: Loss
    groups: SyntheticGroups
    planner: RowPlanner
    prefix_sharing: bool

    def step(self, timeline: Timeline | None = None) -> tuple[BatchPlan, StepResult]:
        """Do it, and say what was planned and what came of it; `timeline` gets the host's part marked.

        Raises:
            NonFiniteError: the loss or the gradient was not finite, so that no update was made and no time is true.
        """
        if timeline:
            timeline.enter("host")
        plan = self.planner.plan(np.arange(len(self.groups)))
        lengths = plan.lengths[self.topology.dp_rank]
        rows = [self._row(parts, length) for parts, length in zip(plan.rows[self.topology.dp_rank], lengths)]
        if timeline:
            timeline.leave("host")
        result = train_step(
            self.engine,
            self.topology,
            self.loss,
            rows,
            lengths=lengths,
            denominator=float(plan.groups),
            progress=0.5,
        )
        if not result.updated:
            raise NonFiniteError(
                f"the measured step has loss {result.loss} and gradient norm {result.grad_norm}: random weights of "
                f"this shape overflow; try model.precision = 'fp32' or another seed"
            )
        return plan, result

    def _row(self, parts: tuple[Part, ...], length: int) -> RowInput:
        row = build_row(groups_of(self.groups, parts), prefix_sharing=self.prefix_sharing, row_tokens=length)
        reference = None
        if self.loss.needs_reference:  # what a model that knows nothing says: -ln(vocabulary) a token
            counts = torch.bincount(row.target_response, minlength=row.num_responses)
            reference = (-log(self.groups.vocab_size) * counts.double()).to(self.topology.device)
        local = local_row(row, self.topology.cp_rank, self.topology.cp_size)
        return RowInput(local.to(self.topology.device), reference)


def measure(
    stepper: Stepper, *, warmup: int, steps: int, breakdown: bool, trace: Path | None, tick: Callable[[], None]
) -> Measurement:
    """`warmup` steps, `steps` measured ones, then one for the breakdown and one for the trace if asked for.

    Collective. `tick` is called after every step; `trace` is the file that rank 0 writes.
    """
    topology = stepper.topology
    kind = reset_peak(topology.device)
    seconds = []
    for number in range(warmup + steps):
        if number == warmup:
            kind = reset_peak(topology.device)
        taken, plan = _timed_step(stepper)
        if number >= warmup:
            seconds.append(taken)
        tick()
    peak = int(_largest(topology, float(peak_bytes(topology.device))))
    parts = None
    if breakdown:
        parts = broken_down(stepper)
        tick()
    if trace:
        _traced(stepper, trace)
        tick()
    responses = len(stepper.groups.response_lengths[0])
    return Measurement(plan, responses, seconds, peak, kind, parts)


def broken_down(stepper: Stepper) -> dict[str, float]:
    """Seconds of each part of one step, mean over the ranks; they add up to the mean step."""
    topology = stepper.topology
    timeline = Timeline(topology.device)
    with instrumented(timeline, stepper.engine):
        _quiet(topology)
        timeline.start()
        stepper.step(timeline)
        timeline.stop()
        _synchronise(topology)
    found = timeline.seconds()
    total = topology.sum_over_world(torch.tensor([found[part] for part in PARTS], dtype=torch.float64))
    return {part: value / topology.world_size for part, value in zip(PARTS, total.tolist())}


def steps_of_a_kind(*, warmup: int, steps: int, breakdown: bool, trace: bool) -> int:
    """How often `measure` calls `tick`."""
    return warmup + steps + breakdown + trace


def _timed_step(stepper: Stepper) -> tuple[float, BatchPlan]:
    _quiet(stepper.topology)
    start = time.perf_counter()
    plan, _ = stepper.step()
    _synchronise(stepper.topology)
    return _largest(stepper.topology, time.perf_counter() - start), plan


def _quiet(topology: Topology) -> None:
    """All ranks are here, and their devices idle."""
    _synchronise(topology)
    topology.barrier()
    _synchronise(topology)


def _synchronise(topology: Topology) -> None:
    if topology.device.type == "cuda":
        torch.cuda.synchronize()


def _largest(topology: Topology, value: float) -> float:
    """The largest of all ranks' values."""
    box = torch.tensor([value], dtype=torch.float64).to(topology.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())


def _traced(stepper: Stepper, path: Path) -> None:
    """One step under torch's profiler; rank 0 writes it as a Chrome trace (.json.gz)."""
    from torch.profiler import ProfilerActivity, profile

    _quiet(stepper.topology)
    if stepper.topology.rank:
        stepper.step()
        return
    activities = [ProfilerActivity.CPU]
    if stepper.topology.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        stepper.step()
        _synchronise(stepper.topology)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
