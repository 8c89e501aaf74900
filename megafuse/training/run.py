"""A training run: everything that `megafuse train` does, on every rank."""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megafuse.checkpoint.keeper import Keeper
from megafuse.checkpoint.lock import RunLock, acquire
from megafuse.checkpoint.saver import Saver
from megafuse.config.drift import began_precision, bind, find_drift, refuse_bound
from megafuse.config.train import TrainConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import RowPlanner, check_vocabulary, row_planner, warnings_of
from megafuse.data.sampler import BatchSampler
from megafuse.errors import ConfigError, NonFiniteError
from megafuse.losses.registry import Loss, make_loss
from megafuse.model.arch import ModelArch, read_arch
from megafuse.model.build import Backend, build_model, choose_backend
from megafuse.parallel.layouts import check_layout
from megafuse.parallel.precision import BEGAN, settled
from megafuse.parallel.topology import Topology, layout, process_groups, world_size_here
from megafuse.parallel.tp_overlap import user_buffers
from megafuse.reference.cache import ReferenceLogps, is_complete, read_cache, require_key
from megafuse.reference.cache import began_precision as cache_precision
from megafuse.reference.compute import write_reference
from megafuse.reference.digest import reference_digest
from megafuse.training.guard import RollBack, SpikeGuard, leave_out, left_out
from megafuse.training.held_out import HeldOut, refuse_trained_prompts
from megafuse.training.loop import Loop
from megafuse.training.optim import wrap_for_training
from megafuse.training.outcome import clear_outcome
from megafuse.training.signals import StopRequest
from megafuse.training.start import HELD_OUT, REFERENCE, refuse_other_architecture, same_content


def train(config: TrainConfig) -> Path:
    """Run (or go on with) the training run at `config.run_dir`. Returns the newest checkpoint's folder.

    Collective: every rank of the world calls it. Raises the errors of `megafuse.errors`; before a NonFiniteError no
    rank has applied the offending update.
    """
    arch = read_arch(config.model.path)
    data = GroupDataset(config.data.dataset)
    loss = make_loss(config.loss)
    check_data(data, arch, loss)
    refuse_other_architecture(config, arch, needs_reference=loss.needs_reference)
    backend = choose_backend(
        config.model,
        config.parallel,
        head_dim=arch.head_dim,
        prefix_sharing=config.data.prefix_sharing,
        overlap=config.overlap,
        distributed_optimizer=config.optim.distributed,
    )
    check_layout(arch, config.parallel, world_size_here())
    planner = row_planner(config, data, arch, world_size_here(), backend)
    with process_groups(), layout(config.parallel, seed=config.seed) as topology:
        config, why = settled(config, topology, partial(bound_by, config))
        return _Run(config, arch, data, loss, backend.at(config.model.precision, why), planner, topology).run()


def bound_by(config: TrainConfig) -> tuple[str, str] | None:
    """The precision that the run is bound to: what it began with, or that of the reference cache that it is to use."""
    if began := began_precision(config.run_dir):
        return began, BEGAN
    cache = config.reference.path
    precision = cache_precision(cache) if cache is not None else None
    return None if precision is None else (precision, f"that of {cache}")


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
    given: ReferenceLogps | None = None  # the log-probs at `reference.path`, once they are read
    digests: dict[Path, dict[str, str]] = field(default_factory=dict)  # see `_digest`; each takes a pass over weights

    def run(self) -> Path:
        config, topology = self.config, self.topology
        held: list[RunLock] = []

        def begin() -> None:
            held.append(acquire(config.run_dir, os.environ))
            clear_outcome(config.run_dir)

        topology.on_rank_zero(begin)
        with held[0] if held else contextlib.nullcontext() as lock:  # rank 0 holds it for all
            return self._locked(lock)

    def _locked(self, lock: RunLock | None) -> Path:
        config, topology = self.config, self.topology
        # first what may refuse, then `bind`: a start that is refused leaves the run folder as it was
        sampler = BatchSampler(len(self.data), config.global_batch_size, config.epochs, config.seed)
        total = min(sampler.total_steps, config.max_steps or sampler.total_steps)
        changed = topology.on_rank_zero(lambda: find_drift(config))
        keeper = Keeper(config, topology, self.data.manifest["digest"]["data"], self._say)
        newest, done = keeper.newest() or (None, 0)
        if newest is not None:
            same = partial(same_content, newest)
            topology.on_rank_zero(lambda: refuse_bound(changed, done, same))
            if done >= total:
                unused = f"; nothing is left for {', '.join(changed)} to act on" if changed else ""
                self._say(f"{config.run_dir} is complete: {newest}{unused}")
                return newest
            keeper.refuse_unfit(newest, self.arch)
        self.given = self._given_reference()
        changes = topology.on_rank_zero(lambda: bind(config, changed, done))
        overlap = self.backend.policy.tp_comm_overlap
        with (
            StopRequest(config.run_dir) as stop,
            user_buffers(overlap, topology, row_tokens=self.planner.budget, hidden=self.arch.hidden_size),
        ):
            return self._train(sampler, keeper, newest, total, lock, stop, changes)

    def _train(
        self,
        sampler: BatchSampler,
        keeper: Keeper,
        newest: Path | None,
        total: int,
        lock: RunLock | None,
        stop: StopRequest,
        changes: list[dict[str, Any]],
    ) -> Path:
        config, topology = self.config, self.topology
        model = build_model(self.arch, config.parallel, topology, self.backend, recompute=config.model.recompute)
        self._say(f"world {topology.world_size} on {topology.device.type}, {self.backend}, {total} steps")
        if topology.rank == 0:  # reads the vocabulary files
            for warning in warnings_of(self.data, self.arch, config.model.path):
                self._say(warning)
        reference = self.given
        if reference is None:
            reference = self._reference(model, keeper, self.data, self.planner, REFERENCE)
        held_out = self._held_out(model, keeper)
        if newest is None:
            keeper.load_model(model, config.model.path)
        engine = wrap_for_training(model, config.optim, self.backend.policy, total_steps=total)
        keeper.preflight(engine)
        roll_backs = 0
        while True:
            manifest = keeper.resume(engine, newest) if newest else {}
            left = topology.on_rank_zero(lambda: left_out(config.run_dir))
            done, interval = int(manifest.get("step", 0)), config.checkpoint.interval
            loop = Loop(
                config, self.arch, self.data, self.loss, topology, self.planner, sampler, keeper, Saver(keeper, done),
                stop, lock, reference, left, held_out, changes,
            )  # fmt: skip
            undone = held_out and interval and done % interval == 0 and manifest.get("held_out") is None
            try:
                return loop.run(
                    engine, done, total, SpikeGuard(config.guard, manifest.get("guard", [])),
                    newest if undone else None,
                )  # fmt: skip
            except RollBack as back:
                found, facts = keeper.newest(), str(back)
                roll_backs += 1
                if found is None or roll_backs > config.max_consecutive_skips:
                    why = "there is no checkpoint to roll back to" if found is None else f"{roll_backs} roll-backs"
                    raise NonFiniteError(f"{facts} ({why})") from None
                newest, step = found[0], back.step
                topology.on_rank_zero(lambda: leave_out(config.run_dir, step))  # noqa: B023 (called at once)
                self._say(f"rolling back to {newest.name}, leaving out the batch of step {step}: {facts}")

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _held_out(self, model: list[Any], keeper: Keeper) -> HeldOut | None:
        """What the run is evaluated on: read, checked, and with its reference log-probs."""
        config = self.config
        if config.held_out.dataset is None:
            return None
        data = GroupDataset(config.held_out.dataset)
        check_data(data, self.arch, self.loss)
        self.topology.on_rank_zero(lambda: refuse_trained_prompts(data, self.data))
        planner = row_planner(config, data, self.arch, self.topology.world_size, self.backend)
        reference = self._reference(model, keeper, data, planner, HELD_OUT)
        return HeldOut(data, planner, reference, batch=config.global_batch_size)

    def _given_reference(self) -> ReferenceLogps | None:
        """Reference log-probs from the cache at `reference.path`; None where there is none or none is needed.

        Raises IntegrityError where that, or what the run itself has begun to compute, is of something else.
        """
        path, own = self.config.reference.path, self.config.run_dir / REFERENCE
        if not self.loss.needs_reference:
            return None
        digest = self._digest(self.data)
        if path is None:
            self.topology.on_rank_zero(lambda: require_key(own, digest, advice=_again(own)))
            return None
        flat, offsets = self.data.response_lengths
        return read_cache(path, digest, offsets, flat)

    def _reference(
        self, model: list[Any], keeper: Keeper, data: GroupDataset, planner: RowPlanner, name: str
    ) -> ReferenceLogps | None:
        """Reference log-probs, computed with the starting weights into RUN/`name`, unless they are there."""
        config = self.config
        if not self.loss.needs_reference:
            return None
        source, digest, folder = self._reference_model, self._digest(data), config.run_dir / name
        self.topology.on_rank_zero(lambda: require_key(folder, digest, advice=_again(folder)))
        if not self.topology.on_rank_zero(lambda: is_complete(folder)):
            keeper.load_model(model, source)
            write_reference(
                model, self.topology, data, planner, folder, name="ref", digest=digest, source=source,
                prefix_sharing=config.data.prefix_sharing, show_progress=self.topology.rank == 0,
            )  # fmt: skip
        flat, offsets = data.response_lengths
        return read_cache(folder, digest, offsets, flat)

    @property
    def _reference_model(self) -> Path:
        return self.config.reference.model or self.config.model.path

    def _digest(self, data: GroupDataset) -> dict[str, str]:
        """The key of the reference log-probs of `data`. Collective."""
        source, precision = self._reference_model, self.config.model.precision
        if data.path not in self.digests:
            self.digests[data.path] = self.topology.on_rank_zero(
                lambda: reference_digest(source, data.manifest, precision=precision)
            )
        return self.digests[data.path]


def _again(folder: Path) -> str:
    return f"remove {folder} to have it computed again"
