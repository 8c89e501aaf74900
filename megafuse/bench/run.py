"""A whole measurement: one model, one batch of prompts, every number of sources, with and without prefix sharing."""

import gc
import itertools
import platform
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megafuse.bench.lengths import ByteRule, LengthData, PromptLengths, TokenizerRule, read_lengths, summary, widen
from megafuse.bench.measure import Measurement, Stepper, measure, steps_of_a_kind
from megafuse.bench.report import FORMAT, ratios, record
from megafuse.bench.shapes import parameter_count, resolve_shape
from megafuse.bench.synthetic import SyntheticGroups
from megafuse.bench.weights import randomise
from megafuse.config.bench import BenchConfig
from megafuse.config.loss import LossConfig
from megafuse.config.train import OptimConfig
from megafuse.data.rows import RowPlanner, row_shape
from megafuse.errors import ConfigError, reason
from megafuse.kernels.packing import group_tokens
from megafuse.losses.registry import Loss, make_loss
from megafuse.model.arch import ModelArch
from megafuse.model.build import Backend, build_model, choose_backend
from megafuse.observe.flops import run_peak_flops
from megafuse.observe.manifest import utc_now, versions, write_json_atomic
from megafuse.observe.progress import Progress
from megafuse.parallel.layouts import check_layout
from megafuse.parallel.precision import settled
from megafuse.parallel.topology import Topology, layout, process_groups, world_size_here
from megafuse.training.optim import wrap_for_training

# Any values do: they change numbers, not what is computed.
SETTINGS: dict[str, dict[str, float]] = {
    "sft": {},
    "dpo": {"beta": 0.01},
    "ln_dpo": {"beta": 10.0},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "rloo": {"beta_kl": 0.05},
    "wrpo": {"beta": 0.01},
}


def bench(config: BenchConfig) -> dict[str, Any] | None:
    """Measure what `config` asks for. Rank 0 writes the report to `config.out` and returns it, the others None.

    Collective: every rank of the world calls it. Everything about the configuration and the data is refused before a
    process group starts. The report is written before the first kind and after each, `complete` at the end. A kind that
    raises, for want of memory perhaps, is in its list `failed` with the reason, and the next one begins; with several
    ranks, of which one alone may have raised, the error ends all.

    Raises:
        ConfigError: a shape, layout, file or batch that cannot be; DataError, IntegrityError: the data cannot be read.
        With several ranks also what a kind raises, as NonFiniteError where random weights overflow.
    """
    arch = resolve_shape(config.model.path)
    backend = choose_backend(
        config.model,
        config.parallel,
        head_dim=arch.head_dim,
        prefix_sharing=True in config.sharing,
        overlap=config.overlap,
        distributed_optimizer=config.distributed_optimizer,
    )
    check_layout(arch, config.parallel, world_size_here())
    batch = draw_batch(config, read_data(config))
    with process_groups(), layout(config.parallel, seed=config.seed) as topology:
        config, why = settled(config, topology)
        return _Bench(config, arch, backend.at(config.model.precision, why), batch, topology).run()


def read_data(config: BenchConfig) -> LengthData:
    """The lengths behind `config.data`. Errors: see `read_lengths`."""
    data = config.data
    rule = TokenizerRule(data.tokenizer) if data.tokenizer else ByteRule(data.bytes_per_token)
    return read_lengths(data.path, rule, responses=config.resolved_responses, max_length=data.max_length)


@dataclass(frozen=True)
class Batch:
    """The prompts of every step, each with as many sources as the largest group needs, and where they come from."""

    prompts: list[PromptLengths]
    facts: dict[str, Any]


def draw_batch(config: BenchConfig, data: LengthData) -> Batch:
    """Draw `global_batch_size` prompts whose largest group fits a row, at random by the seed.

    Raises:
        ConfigError: there are not so many.
    """
    most = max(config.sources)
    wide, borrowed = widen(data.prompts, most, config.seed)
    responses = np.array([sum(map(len, p.sources)) for p in wide], dtype=np.int64)
    flat = np.array([tokens for p in wide for source in p.sources for tokens in source], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(responses)]).astype(np.int64)
    prompts = np.array([p.prompt for p in wide], dtype=np.int64)
    tokens = group_tokens(prompts, flat, offsets, prefix_sharing=config.sharing == (True,))
    fits = np.flatnonzero(tokens <= config.group_limit)
    if len(fits) < config.global_batch_size:
        raise ConfigError(
            f"global_batch_size = {config.global_batch_size}, but {len(fits)} of the {len(wide)} prompts in "
            f"{config.data.path} have a group of {most} source(s) within {config.group_limit} tokens (the smallest has "
            f"{tokens.min()}); lower global_batch_size, or raise data.max_group_tokens"
        )
    drawn = np.random.default_rng(config.seed).permutation(fits)[: config.global_batch_size]
    facts = {
        "path": str(config.data.path),
        "token_rule": data.rule,
        "left_out": {**data.left_out, "prompts above max_group_tokens": len(wide) - len(fits)},
        "of_the_data": summary(data.prompts),
        "of_the_batch": summary([data.prompts[i] for i in drawn]),
        "sources_borrowed_share": {
            str(k): sum(max(0, k - len(data.prompts[i].sources)) for i in drawn) / (k * len(drawn))
            for k in config.sources
        },
        "borrowing": "a prompt with fewer sources takes whole sources of other prompts, at random: lengths are real, "
        "answers to this prompt they are not"
        if borrowed
        else "none needed",
    }
    return Batch([wide[i] for i in drawn], facts)


def free_memory() -> None:
    """Give back what a kind that raised has left: its graph hangs on frames that only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Bench:
    config: BenchConfig
    arch: ModelArch
    backend: Backend
    batch: Batch
    topology: Topology

    @property
    def peak(self) -> float | None:
        """FLOP/s of one device that MFU is taken of."""
        return run_peak_flops(self.config.observe.peak_tflops, self.topology.device, self.config.model.precision)

    def run(self) -> dict[str, Any] | None:
        config, topology = self.config, self.topology
        engine = self._engine()
        loss = make_loss(LossConfig.model_validate({"name": config.loss, **SETTINGS[config.loss]}))
        observe = config.observe
        kinds = [(sources, sharing) for sources in config.sources for sharing in config.sharing]
        extra = {"breakdown": observe.breakdown, "trace": observe.trace is not None}
        steps = steps_of_a_kind(warmup=config.warmup, steps=config.steps, **extra)
        report: dict[str, Any] = {**self._facts(), "complete": False, "results": [], "failed": [], "ratios": []}
        topology.on_rank_zero(lambda: self._write(report))
        for sources, sharing in kinds:
            title = f"bench K={sources} {'shared' if sharing else 'separate'}"
            try:
                if report["failed"]:
                    free_memory()
                with Progress(steps, title, enabled=topology.rank == 0) as progress:
                    found = self._measure(engine, loss, sources, sharing, progress)
                report["results"].append(self._record(sources, sharing, found))
            except Exception as error:
                report["failed"].append({"sources": sources, "prefix_sharing": sharing, "failed": reason(error)})
                if topology.world_size > 1:  # the other ranks may be well, and wait for this one
                    if topology.rank == 0:
                        self._write(report)
                    raise
                traceback.print_exc()
            report["ratios"] = ratios(report["results"])
            report["complete"] = len(report["results"]) + len(report["failed"]) == len(kinds)
            topology.on_rank_zero(lambda: self._write(report))
        return report if topology.rank == 0 else None

    def _write(self, report: dict[str, Any]) -> None:
        if self.config.out:
            write_json_atomic(self.config.out, report)

    def _engine(self) -> Any:
        config, topology = self.config, self.topology
        model = build_model(self.arch, config.parallel, topology, self.backend, recompute=config.model.recompute)
        randomise(model, tp_rank=topology.tp_rank, seed=config.seed)
        # a rate so small that weights stay what they are; every kind is measured on the same model
        optim = OptimConfig(lr=1e-9, schedule="constant", warmup_ratio=0.0, distributed=config.distributed_optimizer)
        engine = wrap_for_training(model, optim, self.backend.policy, total_steps=1_000_000)
        for chunk in engine.model:
            chunk.train()
        return engine

    def _measure(self, engine: Any, loss: Loss, sources: int, sharing: bool, progress: Progress) -> Measurement:
        config, topology = self.config, self.topology
        groups = SyntheticGroups(
            self.batch.prompts, sources, kind=loss.kind, vocab_size=self.arch.vocab_size, seed=config.seed
        )
        data: Any = groups  # has what a planner asks a GroupDataset for
        planner = RowPlanner(
            data,
            self.arch,
            max_row_tokens=config.data.max_row_tokens,
            max_group_tokens=config.group_limit,
            prefix_sharing=sharing,
            shape=row_shape(config.parallel, topology.dp_size, self.backend),
        )
        stepper = Stepper(engine, topology, loss, groups, planner, sharing)
        done = itertools.count(1)
        return measure(
            stepper,
            warmup=config.warmup,
            steps=config.steps,
            breakdown=config.observe.breakdown,
            trace=self._trace_file(sources, sharing),
            tick=lambda: progress.update(next(done)),
        )

    def _trace_file(self, sources: int, sharing: bool) -> Path | None:
        folder = self.config.observe.trace
        return folder / f"k{sources}_{'shared' if sharing else 'separate'}.json.gz" if folder else None

    def _record(self, sources: int, sharing: bool, found: Measurement) -> dict[str, Any]:
        return record(
            found,
            arch=self.arch,
            sources=sources,
            prefix_sharing=sharing,
            world_size=self.topology.world_size,
            peak=self.peak,
        )

    def _facts(self) -> dict[str, Any]:
        cuda = self.topology.device.type == "cuda"
        return {
            "format": FORMAT,
            "created": utc_now(),
            "device": {
                "type": self.topology.device.type,
                "name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
                "count": self.topology.world_size,
                "peak_flops": self.peak,
            },
            "versions": {**versions(), "cuda": torch.version.cuda},
            "config": self.config.model_dump(mode="json"),
            "backend": str(self.backend),
            "model": {"path": str(self.config.model.path), "parameters": parameter_count(self.arch)},
            "data": self.batch.facts,
        }
