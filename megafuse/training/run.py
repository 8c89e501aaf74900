"""A training run: everything that `megafuse train` does, on every rank."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafuse.checkpoint import folder as checkpoints
from megafuse.checkpoint.state import load_model, load_run, run_state, save_state
from megafuse.config.drift import refuse_drift
from megafuse.config.train import TrainConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import BatchPlan, RowPlanner, build_row, check_vocabulary, row_planner
from megafuse.data.sampler import BatchSampler
from megafuse.data.shard import local_row
from megafuse.errors import ConfigError, NonFiniteError
from megafuse.losses.registry import Loss, make_loss
from megafuse.model.arch import ModelArch, read_arch
from megafuse.model.build import Backend, build_model, choose_backend
from megafuse.observe.flops import mfu, model_flops, run_peak_flops
from megafuse.observe.metrics import MetricsLog
from megafuse.observe.progress import Progress
from megafuse.parallel.layouts import check_layout
from megafuse.parallel.topology import Topology, layout, process_groups, world_size_here
from megafuse.parallel.tp_overlap import user_buffers
from megafuse.reference.cache import ReferenceLogps, is_complete, read_cache
from megafuse.reference.compute import write_reference
from megafuse.reference.digest import reference_digest
from megafuse.training.optim import Engine, wrap_for_training
from megafuse.training.step import RowInput, StepResult, train_step


def train(config: TrainConfig) -> Path:
    """Run (or go on with) the training run at `config.run_dir`. Returns the newest checkpoint's folder.

    Collective: every rank of the world calls it. Raises the errors of `megafuse.errors`; before a NonFiniteError no
    rank has applied the offending update.
    """
    arch = read_arch(config.model.path)
    data = GroupDataset(config.data.dataset)
    loss = make_loss(config.loss)
    check_data(data, arch, loss)
    backend = choose_backend(
        config.model,
        config.parallel,
        prefix_sharing=config.data.prefix_sharing,
        overlap=config.overlap,
        distributed_optimizer=config.optim.distributed,
    )
    check_layout(arch, config.parallel, world_size_here())
    planner = row_planner(config, data, arch, world_size_here(), backend)
    with process_groups(), layout(config.parallel, seed=config.seed) as topology:
        return _Run(config, arch, data, loss, backend, planner, topology).run()


def check_data(data: GroupDataset, arch: ModelArch, loss: Loss) -> None:
    """Refuse a data set of the wrong kind or vocabulary.

    Raises:
        ConfigError: naming both sides and the fix.
    """
    if data.kind != loss.kind:
        raise ConfigError(
            f"loss.name = {loss.name!r} trains on data sets of kind {loss.kind!r}, {data.path} is of kind "
            f"{data.kind!r}; build one with `megafuse build --kind {loss.kind}`"
        )
    if len(data) == 0:
        raise ConfigError(f"data set {data.path} has no groups; see the counts in its manifest.json")
    check_vocabulary(data, arch)


@dataclass
class _Run:
    config: TrainConfig
    arch: ModelArch
    data: GroupDataset
    loss: Loss
    backend: Backend
    planner: RowPlanner
    topology: Topology

    def run(self) -> Path:
        config, topology = self.config, self.topology
        sampler = BatchSampler(len(self.data), config.global_batch_size, config.epochs, config.seed)
        total = min(sampler.total_steps, config.max_steps or sampler.total_steps)
        root = config.run_dir / "checkpoints"
        steps = topology.on_rank_zero(lambda: checkpoints.complete_steps(root))
        newest = root / checkpoints.step_name(steps[-1]) if steps else None
        topology.on_rank_zero(lambda: refuse_drift(config))
        if newest and steps[-1] >= total:
            self._say(f"{config.run_dir} is complete: {newest}")
            return newest
        overlap = self.backend.policy.tp_comm_overlap
        with user_buffers(overlap, topology, row_tokens=self.planner.budget, hidden=self.arch.hidden_size):
            return self._train(sampler, newest, total)

    def _train(self, sampler: BatchSampler, newest: Path | None, total: int) -> Path:
        config, topology = self.config, self.topology
        model = build_model(self.arch, config.parallel, topology, self.backend, recompute=config.model.recompute)
        self._say(f"world {topology.world_size} on {topology.device.type}, {self.backend}, {total} steps")
        reference = self._reference(model)
        load_model(model, topology, config.model.path)
        engine = wrap_for_training(model, config.optim, self.backend.policy, total_steps=total)
        done = self._resume(engine, newest) if newest else 0
        return self._loop(engine, sampler, reference, done, total)

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _reference(self, model: list[Any]) -> ReferenceLogps | None:
        """Reference log-probs: from the cache that the run names, or computed now with the starting weights."""
        config = self.config
        if not self.loss.needs_reference:
            return None
        source = config.reference.model or config.model.path
        digest = self.topology.on_rank_zero(
            lambda: reference_digest(source, self.data.manifest, precision=config.model.precision)
        )
        folder = config.reference.path or config.run_dir / "reference"
        if config.reference.path is None and not self.topology.on_rank_zero(lambda: is_complete(folder)):
            load_model(model, self.topology, source)
            write_reference(
                model, self.topology, self.data, self.planner, folder, name="ref", digest=digest, source=source,
                prefix_sharing=config.data.prefix_sharing, show_progress=self.topology.rank == 0,
            )  # fmt: skip
        flat, offsets = self.data.response_lengths
        return read_cache(folder, digest, offsets, flat)

    def _resume(self, engine: Engine, newest: Path) -> int:
        manifest = checkpoints.read_manifest(newest)
        if not manifest["optimizer"]:
            raise ConfigError(
                f"{newest} holds no optimizer state (checkpoint.final_optimizer = false), so this run cannot be made "
                f"longer; start a new run from it with model.path"
            )
        load_run(engine, self.topology, newest, same_layout=manifest["layout"] == self._layout())
        self._say(f"resumed from {newest}")
        return int(manifest["step"])

    def _loop(
        self,
        engine: Engine,
        sampler: BatchSampler,
        reference: ReferenceLogps | None,
        done: int,
        total: int,
    ) -> Path:
        config, topology = self.config, self.topology
        peak = run_peak_flops(config.observe.peak_tflops, topology.device, config.model.precision)
        newest = Path()
        skipped = 0
        main = topology.rank == 0
        log = MetricsLog(
            config.run_dir, resume_step=done, writer=main,
            tensorboard=config.observe.tensorboard, wandb=config.observe.wandb,
        )  # fmt: skip
        for chunk in engine.model:
            chunk.train()
        with log, Progress(total, f"train {self.loss.name}", enabled=main) as progress:
            for step in range(done, total):
                start = time.perf_counter()
                lr = engine.lr
                plan = self.planner.plan(sampler.batch(step))
                result = self._step(engine, plan, reference, step / total)
                skipped = 0 if result.updated else skipped + 1
                record = self._record(step + 1, lr, plan, result, time.perf_counter() - start, peak)
                log.log(record)
                progress.update(step + 1, record)
                self._guard(result, step + 1, skipped)
                last = step + 1 == total
                if last or (config.checkpoint.interval and (step + 1) % config.checkpoint.interval == 0):
                    log.sync()  # the metrics of a step are on disk before the checkpoint that skips it
                    newest = self._save(engine, step + 1, optimizer=not last or config.checkpoint.final_optimizer)
        return newest

    def _step(self, engine: Engine, plan: BatchPlan, reference: ReferenceLogps | None, progress: float) -> StepResult:
        topology, sharing = self.topology, self.config.data.prefix_sharing
        rows, lengths = [], plan.lengths[topology.dp_rank]
        for groups, length in zip(plan.rows[topology.dp_rank], lengths):
            row = build_row([self.data[int(g)] for g in groups], prefix_sharing=sharing, row_tokens=length)
            logps = None
            if reference is not None:
                logps = torch.from_numpy(reference.of_groups(row.groups)).to(topology.device)
            rows.append(RowInput(local_row(row, topology.cp_rank, topology.cp_size).to(topology.device), logps))
        return train_step(
            engine,
            topology,
            self.loss,
            rows,
            lengths=lengths,
            denominator=batch_denominator(self.loss, self.data, plan),
            progress=progress,
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

    def _guard(self, result: StepResult, step: int, skipped: int) -> None:
        if result.updated:
            return
        facts = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; no parameter was updated"
        if self.config.on_nonfinite == "halt" or skipped >= self.config.max_consecutive_skips:
            raise NonFiniteError(
                f"{facts}. Lower optim.lr, look at the data of this step, or set on_nonfinite = 'skip'"
                + (f" ({skipped} skips in a row)" if self.config.on_nonfinite == "skip" else "")
            )
        self._say(f"skipped: {facts}")

    def _layout(self) -> dict[str, Any]:
        """What has to be equal for the state of the random generators to mean the same."""
        return {**self.config.parallel.model_dump(), "world_size": self.topology.world_size}

    def _save(self, engine: Engine, step: int, *, optimizer: bool) -> Path:
        config, topology = self.config, self.topology
        engine.sync_params()
        root = config.run_dir / "checkpoints"
        folder = topology.on_rank_zero(lambda: checkpoints.begin(root, step))
        save_state(run_state(engine, topology, optimizer=optimizer, loading=False), folder)
        topology.barrier()
        facts = {
            "step": step,
            "optimizer": optimizer,
            "layout": self._layout(),
            "data_position": {"step": step, "seed": config.seed, "data": self.data.manifest["digest"]["data"]},
        }
        return topology.on_rank_zero(
            lambda: checkpoints.commit(folder, config.model.path, facts, keep=config.checkpoint.keep)
        )


def batch_denominator(loss: Loss, data: GroupDataset, plan: BatchPlan) -> float:
    """What the loss of a global batch is divided by: its groups, or for `token_mean` its weighted tokens."""
    if loss.settings.get("reduction") != "token_mean":
        return float(plan.groups)
    groups = (data[int(g)] for rank in plan.rows for row in rank for g in row)
    return sum(loss.denominator(g.members, g.weights, g.response_lengths) for g in groups)
