"""The steps of a training run: batch, update, record, guard, save, until the end or a request to stop."""

import math
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megafuse.checkpoint.keeper import Keeper
from megafuse.checkpoint.lock import RunLock
from megafuse.checkpoint.saver import Saver
from megafuse.config.train import TrainConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import BatchPlan, RowPlanner
from megafuse.data.sampler import BatchSampler
from megafuse.errors import NonFiniteError, PreemptedError, TerminatedError
from megafuse.losses.registry import Loss
from megafuse.model.arch import ModelArch
from megafuse.observe.flops import mfu, model_flops, run_peak_flops
from megafuse.observe.metrics import MetricsLog
from megafuse.observe.progress import Progress
from megafuse.parallel.topology import Topology
from megafuse.reference.cache import ReferenceLogps
from megafuse.training.batch import batch_denominator, input_rows
from megafuse.training.fingerprint import refuse_different_replicas
from megafuse.training.grad_norms import worst_part
from megafuse.training.guard import RollBack, SpikeGuard, write_incident
from megafuse.training.held_out import HeldOut, evaluate, score
from megafuse.training.optim import Engine
from megafuse.training.replay import refuse_different_replay
from megafuse.training.signals import END, NONE, StopRequest
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
    saver: Saver
    stop: StopRequest
    lock: RunLock | None
    reference: ReferenceLogps | None
    left_out: set[int]
    held_out: HeldOut | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)

    def run(self, engine: Engine, done: int, total: int, guard: SpikeGuard, late: Path | None) -> Path:
        """Steps `done` + 1 to `total`; returns the newest checkpoint.

        `late` is the checkpoint of step `done` where its evaluation is still to be done.

        Raises:
            PreemptedError, TerminatedError: asked to stop; the checkpoint is written.
            NonFiniteError, RollBack: an update was refused, and the policy says so.
            StorageError: a checkpoint could not be written; see `checkpoint.saver`.
        """
        config = self.config
        peak = run_peak_flops(config.observe.peak_tflops, self.topology.device, config.model.precision)
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
        with log, Progress(total, f"train {self.loss.name}", enabled=main) as progress, watch, self.saver:
            self.stop.can_save = True
            if late is not None:
                self._evaluate_late(engine, done, late, log, watch)
            for step in range(done + 1, total + 1):
                watch.beat(step, "data")
                start = time.perf_counter()
                lr = engine.lr
                plan = self.planner.plan(self.sampler.batch(step - 1))
                rows = input_rows(
                    self.topology, self.data, plan, self.reference, prefix_sharing=config.data.prefix_sharing
                )
                watch.beat(step, "update")
                result = self._step(engine, plan, rows, step, total, guard)
                skipped = 0 if result.updated else skipped + 1
                record = self._record(step, lr, plan, result, time.perf_counter() - start, peak)
                evaluated = None
                if self._evaluates_at(step, total) and (step == total or not result.stop):
                    evaluated = self._evaluate(engine, step, watch, to_its_end=step == total)
                log.log({**record, **_prefixed(evaluated)})
                progress.update(step, record)
                if result.updated:
                    guard.accept(result.grad_norm)
                else:
                    self._refused(result, step, plan, skipped)
                if config.guard.fingerprint_every and step % config.guard.fingerprint_every == 0:
                    refuse_different_replicas(engine, self.topology, step)
                stop = result.stop or self._asked_while_evaluating(evaluated, step, total)
                self._save(engine, step, total, stop, guard, evaluated, log, watch)
                if stop and step < total:
                    self._stopped(stop, step, self.saver.newest)
            self.stop.can_save = False
        return self.saver.newest

    def _save(
        self,
        engine: Engine,
        step: int,
        total: int,
        stop: int,
        guard: SpikeGuard,
        evaluated: dict[str, float] | None,
        log: MetricsLog,
        watch: Watchdog,
    ) -> None:
        """Commit a checkpoint that has been written meanwhile, and begin one where it is due."""
        self.saver.poll()
        last = step == total
        if last or stop or self.saver.due(step):
            watch.beat(step, "save")
            log.sync()  # the metrics of a step are on disk before the checkpoint that skips it
            facts = {"guard": guard.state, "held_out": self._held_out_facts(evaluated), "changes": self.changes}
            optimizer = not last or self.config.checkpoint.final_optimizer
            self.saver.save(engine, step, optimizer=optimizer, facts=facts, must=last or bool(stop))

    def _evaluates_at(self, step: int, total: int) -> bool:
        interval = self.config.checkpoint.interval
        return self.held_out is not None and (step == total or bool(interval and step % interval == 0))

    def _evaluate(self, engine: Engine, step: int, watch: Watchdog, *, to_its_end: bool) -> dict[str, float] | None:
        """The held-out numbers; None where a request to stop came between, unless `to_its_end`."""
        assert self.held_out is not None

        def stopping() -> bool:
            watch.beat(step, "evaluate")
            return bool(self.stop.wanted) and not to_its_end

        engine.sync_params()
        return evaluate(
            engine.bare, self.topology, self.loss, self.held_out,
            prefix_sharing=self.config.data.prefix_sharing, stop=stopping,
        )  # fmt: skip

    def _asked_while_evaluating(self, evaluated: dict[str, float] | None, step: int, total: int) -> int:
        """The strongest request to stop of any rank, where it ended the evaluation of this step."""
        if evaluated is not None or not self._evaluates_at(step, total):
            return NONE
        return -int(self.topology.least(-float(self.stop.wanted))[0])

    def _evaluate_late(self, engine: Engine, step: int, folder: Path, log: MetricsLog, watch: Watchdog) -> None:
        """What a stop left undone at the checkpoint that the run goes on from: its record and manifest get it now."""
        evaluated = self._evaluate(engine, step, watch, to_its_end=False)
        if evaluated is not None:
            log.amend(_prefixed(evaluated))
            facts = self._held_out_facts(evaluated)
            self.topology.on_rank_zero(lambda: self.keeper.add_held_out(folder, facts or {}))

    def _held_out_facts(self, evaluated: dict[str, float] | None) -> dict[str, Any] | None:
        if evaluated is None or self.held_out is None:
            return None
        finite = {name: value for name, value in evaluated.items() if math.isfinite(value)}
        return {"score": score(evaluated), "data": self.held_out.data.manifest["digest"]["data"], **finite}

    def _stopped(self, wanted: int, step: int, newest: Path) -> None:
        if wanted == END:
            raise TerminatedError(f"terminated after step {step}, saved as {newest}")
        raise PreemptedError(
            f"preempted after step {step}, saved as {newest}; started again, the run goes on from there"
        )

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _step(
        self, engine: Engine, plan: BatchPlan, rows: list[RowInput], step: int, total: int, guard: SpikeGuard
    ) -> StepResult:
        every = self.config.guard.replay_every
        replay = every and step % every == 0
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
            **({"check": partial(refuse_different_replay, engine, self.topology, step)} if replay else {}),
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
        norms = result.grad_norms
        facts = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm} ({worst_part(norms)}); "
        facts += "no parameter was updated"
        told = {"reason": "spike" if result.finite else "not finite", "policy": policy, "seed": config.seed,
                "loss": repr(result.loss), "grad_norm": repr(result.grad_norm),
                "grad_norms": {part: repr(norm) for part, norm in norms.items()}}  # fmt: skip
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


def _prefixed(evaluated: dict[str, float] | None) -> dict[str, float]:
    return {f"held_out/{name}": value for name, value in (evaluated or {}).items()}
