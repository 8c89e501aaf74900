"""A run goes on at another layout: the same parameters and Adam state to the bit, the same data, the same loss."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.data.sampler import BatchSampler
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed
from megafuse.testing.gathered import Job, Seen, different, train_and_look
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama, write_tiny_qwen3_moe

pytestmark = pytest.mark.distributed

SAVED, STEPS, GROUPS, BATCH = 2, 3, 24, 8
VOCAB = 121  # odd: two tensor-parallel ranks pad it by a row
# The state is the same, so the next loss differs by the order of additions only; bf16 rounds activations to 8 bits.
TOLERANCE = {"fp32": 1e-6, "bf16": 5e-3}


@dataclass(frozen=True)
class At:
    """One way to run the training: model, precision, and layout."""

    world: int
    parallel: tuple[tuple[str, Any], ...] = ()
    distributed: bool = True
    precision: str = "fp32"
    model: str = "tied"

    def __str__(self) -> str:
        layout = "_".join(f"{name}{int(value)}" for name, value in self.parallel) or "data"
        plain = "" if self.distributed else "_plain"
        return f"{self.model}_{self.precision}_{layout}_of{self.world}{plain}"


def at(world: int, *, distributed: bool = True, precision: str = "fp32", model: str = "tied", **parallel: Any) -> At:
    return At(world, tuple(parallel.items()), distributed, precision, model)


DP1, DP2, CP2 = at(1), at(2), at(2, context=2)
TP2_SP, TP2_SP_PLAIN = (at(2, tensor=2, sequence=True, distributed=d) for d in (True, False))
PP2, PP2_PLAIN = at(2, pipeline=2), at(2, pipeline=2, distributed=False)
VPP2 = at(2, pipeline=2, virtual_pipeline=2)
RELAYOUTS = [
    (DP2, TP2_SP_PLAIN),
    (TP2_SP, DP2),
    (DP1, CP2),
    (DP1, at(4, tensor=2, pipeline=2, sequence=True)),
    (CP2, PP2),
    (PP2_PLAIN, VPP2),
    (VPP2, PP2),
    (VPP2, DP2),
    (PP2_PLAIN, DP1),
    (at(4, tensor=2, context=2, model="untied"), at(2, pipeline=2, first_stage_layers=3, model="untied")),
    (at(2, precision="bf16"), at(2, tensor=2, sequence=True, precision="bf16", distributed=False)),
    (at(2, tensor=2, precision="bf16", distributed=False), at(2, pipeline=2, precision="bf16")),
    (at(2, expert=2, model="moe"), at(2, tensor=2, sequence=True, model="moe")),
    (at(2, pipeline=2, distributed=False, model="moe"), at(2, expert=2, model="moe")),
]


def name(before: At, after: At | None = None) -> str:
    return str(before) if after is None else f"{before}-to-{after}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("relayout")
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    import_hf(write_tiny_llama(root / "hf", seed=seed, vocab=VOCAB), root / "tied")
    import_hf(write_tiny_llama(root / "hf-untied", seed=seed, vocab=VOCAB, tied=False), root / "untied")
    import_hf(write_tiny_qwen3_moe(root / "hf-moe", seed=seed, vocab=VOCAB, tied=True), root / "moe")
    write_tiny_dataset(root / "pair", "pair", seed=seed, vocab=VOCAB, groups=GROUPS)
    return root


def config(root: Path, at: At, run: str) -> TrainConfig:
    return tiny_run(
        root / "runs" / run,
        root / at.model,
        root / "pair",
        model={"precision": at.precision},
        loss={"name": "simpo", "beta": 2.0, "gamma": 0.5},
        optim={"lr": 2e-4, "weight_decay": 0.1, "clip_grad": 0.5, "distributed": at.distributed},
        parallel=dict(at.parallel),
        checkpoint={"interval": SAVED, "final_optimizer": False},
        global_batch_size=BATCH,
        max_steps=STEPS,
    )


@pytest.fixture(scope="module")
def seen(root: Path) -> dict[str, Seen]:
    """Every run whole, and gone on with after its checkpoint at every other layout; one pool of processes a world."""
    found: dict[str, Seen] = {}

    def start(world: int, jobs: Iterable[Job]) -> None:
        jobs = list(jobs)
        results = run_distributed(train_and_look, world, jobs)[0]
        found.update({job.config.run_dir.name: result for job, result in zip(jobs, results, strict=True)})

    def whole(world: int) -> list[Job]:
        befores = dict.fromkeys(before for before, _ in RELAYOUTS if before.world == world)
        return [Job(config(root, before, name(before))) for before in befores]

    def resumed(world: int) -> list[Job]:
        return [
            Job(config(root, after, name(before, after)), root / "runs" / name(before), SAVED)
            for before, after in RELAYOUTS
            if after.world == world
        ]

    start(1, whole(1))
    start(4, whole(4) + resumed(4))
    start(2, whole(2) + resumed(2))
    start(1, resumed(1))
    return found


@pytest.mark.parametrize(("before", "after"), RELAYOUTS, ids=[name(*pair) for pair in RELAYOUTS])
def test_going_on_at_another_layout(root: Path, seen: dict[str, Seen], before: At, after: At) -> None:
    whole, resumed = seen[name(before)], seen[name(before, after)]
    assert len(whole.tensors) > 30
    assert whole.problems == resumed.problems == []
    assert different(whole, resumed) == []
    assert whole.steps == resumed.steps == {float(SAVED)}
    assert whole.groups == resumed.groups
    sampler = BatchSampler(GROUPS, BATCH, 1, 0)
    assert whole.batches == [sorted(sampler.batch(step).tolist()) for step in range(STEPS)]
    assert resumed.batches == whole.batches[SAVED:]
    one, other = (read_metrics(root / "runs" / run) for run in (name(before), name(before, after)))
    assert other[:SAVED] == one[:SAVED]
    last, now = one[-1], other[-1]
    assert [now[k] for k in ("step", "lr", "prompts", "tokens")] == [
        last[k] for k in ("step", "lr", "prompts", "tokens")
    ]
    print(name(before, after), abs(now["loss"] / last["loss"] - 1))
    assert now["loss"] == pytest.approx(last["loss"], rel=TOLERANCE[before.precision])
