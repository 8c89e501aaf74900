"""The steps of a training run: batch, update, record, guard, save, until the end or a request to stop."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafuse.checkpoint.keeper import Keeper
from megafuse.checkpoint.lock import RunLock
from megafuse.config.train import TrainConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import BatchPlan, RowPlanner, build_row
from megafuse.data.sampler import BatchSampler
from megafuse.data.shard import local_row
from megafuse.errors import NonFiniteError, PreemptedError, TerminatedError
from megafuse.losses.registry import Loss
from megafuse.model.arch import ModelArch
from megafuse.observe.flops import mfu, model_flops, run_peak_flops
from megafuse.observe.metrics import MetricsLog
from megafuse.observe.progress import Progress
from megafuse.parallel.topology import Topology
from megafuse.reference.cache import ReferenceLogps
from megafuse.training.fingerprint import refuse_different_replicas
from megafuse.training.guard import RollBack, SpikeGuard, write_incident
from megafuse.training.optim import Engine
from megafuse.training.signals import END, StopRequest
from megafuse.training.step import RowInput, StepResult, train_step
from megafuse.training.watchdog import Watchdog


@dataclass
class Loop:
    """What the steps need. One object goes from a checkpoint to the end of the run, or to a roll-back."""

    config: TrainConfig
    arch: ModelArch
    data: GroupDataset
    loss: Loss
    topology: Topology
    planner: RowPlanner
    sampler: BatchSampler
    keeper: Keeper
    stop: StopRequest
    lock: RunLock | None
    reference: ReferenceLogps | None
    left_out: set[int]

    def run(self, engine: Engine, done: int, total: int, guard: SpikeGuard) -> Path:
        """Steps `done` + 1 to `total`; returns the newest checkpoint.

        Raises:
            PreemptedError, TerminatedError: asked to stop; the checkpoint is written.
            NonFiniteError, RollBack: an update was refused, and the policy says so.
        """
        config = self.config
        peak = run_peak_flops(config.observe.peak_tflops, self.topology.device, config.model.precision)
        newest = Path()
        skipped = 0
        main = self.topology.rank == 0
        log = MetricsLog(
            config.run_dir, resume_step=done, writer=main,
            tensorboard=config.observe.tensorboard, wandb=config.observe.wandb,
        )  # fmt: skip
        watch = Watchdog(
            config.run_dir, self.topology.rank, self.topology.world_size,
            hang_seconds=config.guard.hang_seconds, total=total, lock=self.lock, stop=self.stop, environ=os.environ,
        )  # fmt: skip
        for chunk in engine.model:
            chunk.train()
        with log, Progress(total, f"train {self.loss.name}", enabled=main) as progress, watch:
            self.stop.can_save = True
            for step in range(done + 1, total + 1):
                watch.beat(step, "data")
                start = time.perf_counter()
                lr = engine.lr
                plan = self.planner.plan(self.sampler.batch(step - 1))
                rows = self._rows(plan)
                watch.beat(step, "update")
                result = self._step(engine, plan, rows, step, total, guard)
                skipped = 0 if result.updated else skipped + 1
                record = self._record(step, lr, plan, result, time.perf_counter() - start, peak)
                log.log(record)
                progress.update(step, record)
                if result.updated:
                    guard.accept(result.grad_norm)
                else:
                    self._refused(result, step, plan, skipped)
                if config.guard.fingerprint_every and step % config.guard.fingerprint_every == 0:
                    refuse_different_replicas(engine, self.topology, step)
                last = step == total
                if last or result.stop or (config.checkpoint.interval and step % config.checkpoint.interval == 0):
                    watch.beat(step, "save")
                    log.sync()  # the metrics of a step are on disk before the checkpoint that skips it
                    newest = self.keeper.save(
                        engine, step, optimizer=not last or config.checkpoint.final_optimizer, guard=guard.state
                    )
                if result.stop and not last:
                    self._stopped(result.stop, step, newest)
            self.stop.can_save = False
        return newest

    def _stopped(self, wanted: int, step: int, newest: Path) -> None:
        if wanted == END:
            raise TerminatedError(f"terminated after step {step}, saved as {newest}")
        raise PreemptedError(
            f"preempted after step {step}, saved as {newest}; started again, the run goes on from there"
        )

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _rows(self, plan: BatchPlan) -> list[RowInput]:
        topology, sharing = self.topology, self.config.data.prefix_sharing
        rows = []
        for groups, length in zip(plan.rows[topology.dp_rank], plan.lengths[topology.dp_rank]):
            row = build_row([self.data[int(g)] for g in groups], prefix_sharing=sharing, row_tokens=length)
            logps = None
            if self.reference is not None:
                logps = torch.from_numpy(self.reference.of_groups(row.groups)).to(topology.device)
            rows.append(RowInput(local_row(row, topology.cp_rank, topology.cp_size).to(topology.device), logps))
        return rows

    def _step(
        self, engine: Engine, plan: BatchPlan, rows: list[RowInput], step: int, total: int, guard: SpikeGuard
    ) -> StepResult:
        return train_step(
            engine,
            self.topology,
            self.loss,
            rows,
            lengths=plan.lengths[self.topology.dp_rank],
            denominator=batch_denominator(self.loss, self.data, plan),
            progress=(step - 1) / total,
            refuse=lambda grad_norm: step in self.left_out or guard.is_spike(grad_norm),
            stop=lambda: self.stop.wanted,
        )

    def _record(
        self, step: int, lr: float, plan: BatchPlan, result: StepResult, seconds: float, peak: float | None
    ) -> dict[str, Any]:
        flops = model_flops(self.arch, plan.model_tokens, plan.head_rows, plan.pairs)
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "prompts": plan.groups,
            "tokens": plan.useful_tokens,
            "tokens_computed": plan.computed_tokens,
            "tokens_per_second": plan.useful_tokens / seconds,
            "step_seconds": seconds,
            "mfu": mfu(flops, seconds, self.topology.world_size, peak),
            "updated": result.updated,
            **result.metrics,
        }

    def _refused(self, result: StepResult, step: int, plan: BatchPlan, skipped: int) -> None:
        """An update was made by no rank: write down what it was of, then halt, skip or roll back."""
        config = self.config
        if result.finite and step in self.left_out:
            self._say(f"step {step}: left out since a roll-back; no parameter was updated")
            return
        policy = config.guard.on_spike if result.finite else config.on_nonfinite
        facts = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; no parameter was updated"
        told = {"reason": "spike" if result.finite else "not finite", "policy": policy, "seed": config.seed,
                "loss": repr(result.loss), "grad_norm": repr(result.grad_norm)}  # fmt: skip
        path = self.topology.on_rank_zero(lambda: write_incident(config.run_dir, step, self.data, plan, told))
        facts += f". Its prompts are in {path}"
        if policy == "rollback" and step not in self.left_out:
            raise RollBack(step, facts)
        if policy == "halt" or skipped >= config.max_consecutive_skips:
            field = "guard.on_spike" if result.finite else "on_nonfinite"
            raise NonFiniteError(
                f"{facts}. Lower optim.lr, look at the data of this step, or set {field} = 'skip'"
                + (f" ({skipped} skips in a row)" if policy == "skip" else "")
            )
        self._say(f"skipped: {facts}")


def batch_denominator(loss: Loss, data: GroupDataset, plan: BatchPlan) -> float:
    """What the loss of a global batch is divided by: its groups, or for `token_mean` its weighted tokens."""
    if loss.settings.get("reduction") != "token_mean":
        return float(plan.groups)
    groups = (data[int(g)] for rank in plan.rows for row in rank for g in row)
    return sum(loss.denominator(g.members, g.weights, g.response_lengths) for g in groups)
