"""When checkpoints are written, and what a failed one means: the run goes on, tries again, or stops.

A save begins with a look at every number that it would hold: a state that is not finite is not saved. Then it has three
parts. Planning is collective and fast; writing is each rank's own; committing (metadata, manifest,
rename, LATEST, pruning) is rank 0's, once every rank has told what it wrote. With `checkpoint.async_save` the writing
is a background process's, and the commit follows at the first step that finds all ranks done.
"""

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megafuse.checkpoint import folder as folders
from megafuse.checkpoint.finite import named_tensors, non_finite, shortened
from megafuse.checkpoint.keeper import Keeper
from megafuse.checkpoint.state import run_state
from megafuse.checkpoint.writer import Background, Plan, finish_save, plan_save, write_files
from megafuse.errors import NonFiniteError, ReplicaError, StorageError
from megafuse.training.guard import RollBack
from megafuse.training.optim import Engine


@dataclass
class _Flight:
    """A checkpoint that is being written."""

    step: int
    plan: Plan
    facts: dict[str, Any]
    writer: Background | None


@dataclass
class Saver:
    """The checkpoints of one start of a run. Methods are collective. A context manager around the training loop."""

    keeper: Keeper
    saved_step: int
    """Step of the newest complete checkpoint; of the start where there is none."""
    newest: Path = field(default_factory=Path)
    _flight: _Flight | None = None
    _failures: int = 0  # in a row
    _again: bool = False  # a background writer failed: begin anew at the next step

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._flight is None:
            return
        if isinstance(error, RollBack | NonFiniteError | ReplicaError) or kind is None:  # every rank is here
            with contextlib.suppress(StorageError):
                self.finish()
        elif self._flight.writer is not None:
            self._flight.writer.abandon()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be begun after `step`: by the interval, after a failure, or for too many steps."""
        interval = self.keeper.config.checkpoint.interval
        return bool(interval and step % interval == 0) or self._again or self._overdue(step)

    def _overdue(self, step: int) -> bool:
        config = self.keeper.config.checkpoint
        limit = config.max_unsaved_steps or config.interval * (config.max_save_errors + 1)
        return bool(limit) and step - self.saved_step >= limit

    def poll(self) -> None:
        """Commit the save in flight where all ranks have written; learn of it where a writer failed or died."""
        flight = self._flight
        if flight is None or flight.writer is None:
            return
        writer = flight.writer
        done, sound = self.keeper.topology.least(float(writer.done), float(not writer.failed))
        if not sound and not writer.done:
            writer.abandon()  # it may have minutes to go, for nothing
        if done or not sound:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, and commit it.

        Raises:
            StorageError: it failed, as the one before, and `checkpoint.on_save_error` says stop.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            self._commit(flight)
        except (OSError, StorageError) as error:
            self._failed(flight.step, flight.plan.folder, error, final=False, background=True)

    def save(self, engine: Engine, step: int, *, optimizer: bool, facts: dict[str, Any], must: bool) -> None:
        """Begin the checkpoint of `step`; with `must`, or where too many steps are unsaved, it is complete on return.

        facts: what the manifest is to say beside the keeper's own.

        Raises:
            StorageError: it could not be written, and `checkpoint.on_save_error`, `must` or
                `checkpoint.max_unsaved_steps` leave no other way.
            NonFiniteError, RollBack: a parameter, master weight or moment is NaN or infinite, on any rank; nothing of
                this step is written.
        """
        self.finish()
        if not (must or self.due(step)):
            return  # the one in flight was enough
        keeper = self.keeper
        must = must or self._overdue(step)
        background = keeper.config.checkpoint.async_save and not must
        self._again = False
        engine.sync_params()
        folder = keeper.root / f"{folders.step_name(step)}.tmp"
        try:
            keeper.preflight(engine, optimizer=optimizer)
            state = run_state(engine, keeper.topology, optimizer=optimizer, loading=False)
            self._refuse_non_finite(state, step)
            keeper.topology.on_rank_zero(lambda: folders.begin(keeper.root, step))
            plan = plan_save(state, folder, keeper.topology)
            facts = {**keeper.facts(step, optimizer=optimizer), **facts}
            flight = _Flight(step, plan, facts, Background(plan) if background else None)
            if background:
                self._flight = flight
            else:
                self._commit(flight)
        except (OSError, StorageError) as error:
            self._failed(step, folder, error, final=must, background=False)

    def _refuse_non_finite(self, state: dict[str, Any], step: int) -> None:
        """The last update was refused if its loss or gradient was bad; what it made of the weights, here."""
        keeper = self.keeper
        if not (names := non_finite(named_tensors(state), keeper.topology)):
            return
        good = keeper.topology.on_rank_zero(lambda: folders.complete_steps(keeper.root))
        facts = f"step {step}: no checkpoint is written, these are NaN or infinite: {shortened(names)}"
        if keeper.config.on_nonfinite == "rollback":
            raise RollBack(step, facts)
        left = f"The newest good one is of step {good[-1]}: a new start goes on from it" if good else "There is none"
        raise NonFiniteError(
            f"{facts}. {left}. Lower optim.lr (--allow_change optim.lr), look at the data since then, or set "
            "on_nonfinite = 'rollback', which leaves out the batch of this step"
        )

    def _commit(self, flight: _Flight) -> None:
        keeper, plan = self.keeper, flight.plan
        written = flight.writer.wait() if flight.writer is not None else write_files(plan, plan.staged())
        told = keeper.topology.gather_on_rank_zero(written)

        def commit() -> Path:
            ranks = told or []
            if failed := [f"rank {rank}: {one.error}" for rank, one in enumerate(ranks) if one.error]:
                raise StorageError("; ".join(failed[:3]) + (f" and {len(failed) - 3} more" if failed[3:] else ""))
            finish_save(plan, [one.results for one in ranks])
            hashes = {name: digest for one in ranks for name, digest in one.hashes.items()}
            return keeper.commit(plan.folder, flight.facts, hashes)

        self.newest = keeper.topology.on_rank_zero(commit)
        self.saved_step, self._failures = flight.step, 0

    def _failed(self, step: int, folder: Path, error: Exception, *, final: bool, background: bool) -> None:
        """Remove what there is of the checkpoint; go on where that is allowed. Every rank is here, with this error."""
        keeper, config = self.keeper, self.keeper.config.checkpoint
        self._failures += 1

        def clean() -> str:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                return f" ({shutil.disk_usage(keeper.root).free:,} bytes are free)"
            return ""

        free = keeper.topology.on_rank_zero(clean)
        told = f"the checkpoint of step {step} could not be written to {folder}: {error}{free}"
        if background and self._failures == 1:
            self._again = True
            keeper.say(f"{told}; trying again with a new writer")
            return
        if final or config.on_save_error == "stop" or self._failures > config.max_save_errors:
            raise StorageError(
                f"{told}. The newest complete checkpoint is of step {self.saved_step}; make room or repair the folder, "
                "and start again"
            ) from None
        keeper.say(f"{told}; going on ({self._failures} failed in a row, {config.max_save_errors} are allowed)")
