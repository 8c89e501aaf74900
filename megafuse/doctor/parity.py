"""Every layout against one process in float64: loss, log-probs of each response, every gradient, the gradient norm.

A tiny random model of the chosen family is written and converted on every rank, alike everywhere by its seed, so no
shared file system is needed. Rank 0 computes the oracle; each layout then runs the training step's own code.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megafuse.config.loss import LossConfig
from megafuse.config.parity import ParityConfig
from megafuse.config.train import ModelConfig, OptimConfig, ParallelConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import data_parts
from megafuse.data.rows import RowPlanner, RowShape, part_tokens, row_shape
from megafuse.errors import ConfigError
from megafuse.losses.registry import make_loss
from megafuse.model.arch import ModelArch, read_arch
from megafuse.parallel.layouts import check_layout, layout_name, parse_layout, workable
from megafuse.parallel.topology import layout, process_groups, world_size_here
from megafuse.testing.families import WRITERS
from megafuse.testing.parity import LOSSES
from megafuse.testing.tiny import write_tiny_dataset

KINDS = ("sft", "pair", "rloo", "wrpo")


@dataclass(frozen=True)
class Cell:
    """One line of the report: differences relative to the oracle, and the parameter whose gradient is the worst.

    `norm_difference` is that of the gradient norm that updates are clipped by, or of a part of it;
    `own_norm_difference` compares it with the float64 norm of the layout's own gradients (of which 16 bits are known
    in bf16 runs).
    """

    layout: str
    loss: str
    rows: str
    micro_batches: str
    loss_difference: float
    logp_difference: float
    gradient_difference: float
    parameter: str
    norm_difference: float
    own_norm_difference: float
    ok: bool


def tolerance(config: ParityConfig) -> float:
    """The bound that `config` asks for, or the default for its precision and this machine."""
    if config.tolerance is not None:
        return config.tolerance
    if config.precision == "bf16":
        return 5e-2  # 8 bits of mantissa
    return 1e-4 if torch.cuda.is_available() else 1e-5  # CUDA adds up in other orders than the oracle


def resolve_layouts(config: ParityConfig, arch: ModelArch, world: int) -> list[tuple[str, ParallelConfig, bool]]:
    """(name, layout, distributed optimizer) of what `config` asks for, or of all that fit.

    Raises ConfigError for one that is not understood or does not fit `world` ranks.
    """
    if config.layouts:
        wanted = [(name, *parse_layout(name)) for name in config.layouts]
        for _, parallel, _ in wanted:
            check_layout(arch, parallel, world)
        return wanted
    return [(layout_name(parallel, True), parallel, True) for parallel in workable(arch, world)]


def parity(config: ParityConfig, show: Callable[[Cell], None] | None = None) -> list[Cell]:
    """Compare every layout; rank 0 shows and returns the cells, other ranks an empty list. Collective.

    `config` has a seed and has passed `check_parity`.
    """
    with tempfile.TemporaryDirectory() as folder:
        lab = _Lab(Path(folder), config)
        layouts = resolve_layouts(config, lab.arch, world_size_here())
        torch.backends.cuda.matmul.allow_tf32 = False
        with process_groups() as (rank, _):
            cells = []
            oracle = lab.oracle(rank)
            for name, parallel, distributed in layouts:
                for cell in lab.cells(name, parallel, distributed, oracle):
                    cells.append(cell)
                    if show:
                        show(cell)
                dist.barrier()
            return cells


def check_parity(config: ParityConfig) -> None:
    """Refuse what cannot be, before any process starts.

    Raises:
        ConfigError: a loss or a layout that is not known, or a layout that does not fit the ranks.
    """
    unknown = sorted(set(config.losses) - set(LOSSES))
    if unknown:
        raise ConfigError(f"losses names {unknown[0]!r}; known: {', '.join(LOSSES)}")
    with tempfile.TemporaryDirectory() as folder:
        arch = read_arch(WRITERS[config.architecture](Path(folder) / "hf", seed=0))
    resolve_layouts(config, arch, config.processes if config.processes > 1 else world_size_here())


def resolve_seed(config: ParityConfig) -> ParityConfig:
    """`config` with a seed: its own, or a fresh one.

    Raises ConfigError under torchrun or srun without one: every rank would draw another.
    """
    if config.seed is not None:
        return config
    if world_size_here() > 1:
        raise ConfigError("seed is not set, and every rank would draw its own; give --seed N, the same everywhere")
    return config.model_copy(update={"seed": int.from_bytes(os.urandom(4), "little")})


class _Lab:
    """The model, the data sets and the oracle, alike on every rank."""

    def __init__(self, folder: Path, config: ParityConfig) -> None:
        self.config = config
        self.names = config.losses or tuple(x for x in LOSSES if (config.precision, x) != ("bf16", "rloo_clipped"))
        self.hf, self.model = folder / "hf", folder / "model"
        _on_every_rank(folder, self._write)
        self.arch = read_arch(self.model)
        self.data = {kind: GroupDataset(folder / kind) for kind in KINDS}
        self.kind = {name: make_loss(LossConfig.model_validate(LOSSES[name])).kind for name in self.names}

    def _write(self, folder: Path) -> None:
        from megafuse.converters.importer import import_hf

        assert self.config.seed is not None
        WRITERS[self.config.architecture](self.hf, seed=self.config.seed)
        import_hf(self.hf, self.model)
        for i, kind in enumerate(KINDS):
            write_tiny_dataset(
                folder / kind, kind, seed=self.config.seed + i, groups=self.config.groups,
                sources=self.config.sources, responses=self.config.responses, longest=self.config.response_tokens,
            )  # fmt: skip

    def oracle(self, rank: int) -> dict[str, Any]:
        """`reference`: log-probs to train against, on every rank; on rank 0 also the facts of each loss.

        The reference is the policy plus noise, so that no loss stands at the special point where both are equal.
        """
        from megafuse.converters.plan import Plan
        from megafuse.testing.gradients import oracle_facts
        from megafuse.testing.oracle import double_model, response_logps

        box: list[Any] = [None]
        if rank == 0:
            model, plan = double_model(self.hf), Plan(self.arch)
            rng = np.random.default_rng(self.config.seed)
            reference = {}
            for kind in set(self.kind.values()):
                data = self.data[kind]
                with torch.no_grad():
                    own = np.concatenate([response_logps(model, data[i]).numpy() for i in range(len(data))])
                reference[kind] = own + rng.normal(0, 0.3, len(own))
            box = [reference]
        dist.broadcast_object_list(box, src=0)
        if rank:
            return {"reference": box[0]}
        facts = {
            name: oracle_facts(model, plan, LossConfig.model_validate(LOSSES[name]), self.data[kind], box[0][kind])
            for name, kind in self.kind.items()
        }
        return {"reference": box[0], "facts": facts}

    def cells(self, name: str, parallel: ParallelConfig, distributed: bool, oracle: dict[str, Any]) -> Iterator[Cell]:
        """All losses and kinds of rows at one layout, on rank 0; the model is built once. Collective."""
        from megafuse.checkpoint.state import load_model
        from megafuse.model.build import build_model, choose_backend
        from megafuse.testing.gradients import compare, layout_facts, layout_logps
        from megafuse.training.optim import wrap_for_training

        config = self.config
        settings = ModelConfig(path=self.model, precision=config.precision)
        backend = choose_backend(
            settings, parallel, head_dim=self.arch.head_dim, prefix_sharing=True, distributed_optimizer=distributed
        )
        with layout(parallel) as topology:
            model = build_model(self.arch, parallel, topology, backend)
            load_model(model, topology, self.model)
            optim = OptimConfig(lr=1.0, distributed=distributed)
            engine = wrap_for_training(model, optim, backend.policy, total_steps=1)
            for kind, rows, split in product(sorted(set(self.kind.values())), config.rows, config.micro_batches):
                data, shared = self.data[kind], rows == "shared"
                planner = self._planner(data, shared, split, row_shape(parallel, topology.dp_size, backend))
                logps = layout_logps(engine, topology, planner, data, prefix_sharing=shared)
                for loss in (loss for loss, of in self.kind.items() if of == kind):
                    facts = layout_facts(
                        engine, topology, planner, LossConfig.model_validate(LOSSES[loss]), data,
                        oracle["reference"][kind], logps, prefix_sharing=shared,
                    )  # fmt: skip
                    if facts is None:
                        continue
                    apart = compare(facts, oracle["facts"][loss])
                    yield Cell(
                        name, loss, rows, split, apart.loss, apart.logps, apart.gradient, apart.parameter,
                        apart.norm, apart.own_norm, ok=apart.worst <= tolerance(config),
                    )  # fmt: skip

    def _planner(self, data: GroupDataset, shared: bool, split: str, shape: RowShape) -> RowPlanner:
        parts = data_parts(data, prefix_sharing=shared)
        tokens = part_tokens(data, parts, prefix_sharing=shared)
        longest, most = int(tokens.max()), int(tokens.sum()) + shape.multiple * len(tokens)
        return RowPlanner(
            data, self.arch, max_row_tokens=max(longest, shape.multiple) if split == "many" else most,
            max_group_tokens=most, prefix_sharing=shared, shape=shape,
        )  # fmt: skip


def _on_every_rank(folder: Path, write: Callable[[Path], None]) -> None:
    """Have what `write` writes below `folder` on every rank. In a joined world transformers saves on rank 0 only."""
    if not dist.is_initialized():
        write(folder)
        return
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        write(folder)
        box = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}]
    dist.broadcast_object_list(box, src=0)
    for name, content in box[0].items() if dist.get_rank() else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def report(config: ParityConfig, cells: list[Cell]) -> dict[str, Any]:
    """Everything that was found, for JSON."""
    from megafuse.observe.manifest import utc_now, versions

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "created": utc_now(),
        "device": device,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
        "tolerance": tolerance(config),
        "ok": all(cell.ok for cell in cells),
        "cells": [asdict(cell) for cell in cells],
    }


def verdict(config: ParityConfig, cells: list[Cell]) -> bool:
    """Print one line a layout and loss, its worst cell, and what it all comes to. True when everything passes."""
    from rich import box
    from rich.table import Table

    from megafuse.observe.console import make_console

    table = Table(
        "layout", "loss", "loss diff", "log-prob diff", "norm diff", "gradient diff", "worst parameter", "",
        box=box.SIMPLE,
    )  # fmt: skip
    for name, loss, cell in summary(cells):
        figures = (cell.loss_difference, cell.logp_difference, cell.norm_difference, cell.gradient_difference)
        mark = "[green]ok[/]" if cell.ok else f"[red]FAILS[/] ({cell.rows} rows, {cell.micro_batches} micro-batches)"
        table.add_row(name, loss, *(f"{x:.1e}" for x in figures), cell.parameter, mark)
    failed = [cell for cell in cells if not cell.ok]
    console = make_console(highlight=False)
    console.print(table)
    total = f"All {len(cells)} combinations of layout, loss, rows and micro-batches equal the float64 oracle"
    facts = f"{config.architecture}, {config.precision}, seed {config.seed}, bound {tolerance(config):g}"
    console.print(
        f"{len(failed)} of {len(cells)} combinations are out of bounds ({facts})." if failed else f"{total} ({facts}).",
        style="red" if failed else "green",
    )
    return not failed


def summary(cells: list[Cell]) -> list[tuple[str, str, Cell]]:
    """(layout, loss, its worst cell), in the order of the run."""
    worst: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        known = worst.get((cell.layout, cell.loss))
        if known is None or _size(cell) > _size(known):
            worst[cell.layout, cell.loss] = cell
    return [(layout, loss, cell) for (layout, loss), cell in worst.items()]


def _size(cell: Cell) -> float:
    return max(cell.loss_difference, cell.logp_difference, cell.norm_difference, cell.gradient_difference)


def parity_in_processes(config: ParityConfig) -> list[Cell]:
    """`parity` for a worker process of megafuse.testing.distributed: rank 0's cells."""
    from megafuse.parallel.quiet import quiet_dependencies
    from megafuse.testing.distributed import freeze_modules

    with quiet_dependencies():
        freeze_modules()
        return parity(config, Progress())


class Progress:
    """Lines on stderr: each layout that begins to give results, and each cell that fails."""

    def __init__(self) -> None:
        self.layout = ""

    def __call__(self, cell: Cell) -> None:
        """Tell of one more cell."""
        if cell.layout != self.layout:
            self.layout = cell.layout
            print(f"layout {cell.layout}", file=sys.stderr, flush=True)
        if not cell.ok:
            print(f"FAILS: {cell}", file=sys.stderr, flush=True)
