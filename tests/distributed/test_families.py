"""Every family at every kind of layout: loads, logits and saves through megatron-core, gradients, two updates."""

import filecmp
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.config.parity import ParityConfig
from megafuse.config.train import TrainConfig
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.converters.inspect import inspect
from megafuse.converters.logits import huggingface_logits, random_tokens
from megafuse.converters.rungs import LayoutFacts
from megafuse.doctor.parity import Cell
from megafuse.model.arch import read_arch
from megafuse.observe.metrics import read_metrics
from megafuse.testing.convert_workers import work_on_families
from megafuse.testing.distributed import run_distributed
from megafuse.testing.families import WRITERS
from megafuse.testing.oracle import oracle_steps
from megafuse.testing.tiny import tiny_run, write_tiny_dataset

pytestmark = pytest.mark.distributed

FAMILIES = sorted(WRITERS)
SPARSE = ("mixtral", "qwen3_moe")
NEW = ("gemma2", "mistral", "mixtral", "qwen2")  # the gradients of the others: test_gradients.py
VOCAB = 121  # odd, so that tensor parallelism pads it
TOKENS = 160  # windows are of 8 tokens, the knee of the rope scaling is at 16, its original context has 64
BOUND = 2e-6  # of the largest logit, in fp32
STEPS = 2


def tensor(family: str) -> str:
    return "tp2-sp" if family in SPARSE else "tp2"


def layouts(family: str, world: int) -> list[str]:
    """Names of the layouts of `world` ranks."""
    if world == 4:
        return [f"{tensor(family)}-pp2"]
    if world == 1:
        return ["dp"]
    own = {"gemma2": ["pp2-vpp2", "pp2-first1"], "mixtral": ["ep2", "tp2-sp-ep2"], "qwen3_moe": ["ep2"]}
    return [tensor(family), "pp2", "cp2", *own.get(family, [])]


@dataclass(frozen=True)
class Bench:
    """Folders of every family under `root`: FAMILY/hf, FAMILY/ckpt, FAMILY/logits.pt; and what the ranks found."""

    root: Path
    seed: int
    facts: dict[tuple[str, str], list[LayoutFacts]]  # by family and layout, one a rank
    cells: dict[str, list[Cell]]

    def training(self, family: str) -> TrainConfig:
        """Two steps at TP2 that start straight from the Hugging Face folder."""
        return tiny_run(
            self.root / family / "run",
            self.root / family / "hf",
            self.root / "data",
            data={"max_row_tokens": 128},
            loss={"name": "ln_dpo", "beta": 3.0},
            optim={"lr": 2e-4, "distributed": False},
            parallel={"tensor": 2, "sequence": family in SPARSE},
            checkpoint={"final_optimizer": False},
            global_batch_size=4,
            max_steps=STEPS,
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    bench = Bench(tmp_path_factory.mktemp("families"), seed, {}, {})
    write_tiny_dataset(bench.root / "data", "pair", seed=seed, groups=12)
    ids = {}
    for family in FAMILIES:
        folder = bench.root / family
        WRITERS[family](folder / "hf", seed=seed, vocab=VOCAB)
        import_hf(folder / "hf", folder / "ckpt")
        ids[family] = random_tokens(read_arch(folder / "ckpt"), TOKENS, seed)
        torch.save(huggingface_logits(folder / "hf", ids[family]), folder / "logits.pt")
    for world in (1, 2, 4):
        climbs = [
            (f / "ckpt", f / "hf", layouts(f.name, world), ids[f.name].tolist(), f / "logits.pt", saved)
            for f in (bench.root / family for family in FAMILIES)
            for saved in [f / "saved" if world == 4 else None]
        ]
        parities = [parity_of(family, seed) for family in NEW] if world == 2 else []
        trainings = [bench.training(family) for family in FAMILIES] if world == 2 else []
        ranks = run_distributed(work_on_families, world, climbs, parities, trainings, timeout=580)
        for family, *found in zip(FAMILIES, *(facts for facts, _ in ranks), strict=True):
            for of_layout in zip(*found, strict=True):
                bench.facts[family, of_layout[0].layout] = list(of_layout)
        bench.cells.update(zip(NEW, ranks[0][1]) if parities else {})
    return bench


def parity_of(family: str, seed: int) -> ParityConfig:
    """Gradients of every parameter, prefix-shared and packed rows, past the window."""
    return ParityConfig(
        architecture=family, layouts=("tp2-sp", "pp2", "ep2" if family in SPARSE else "cp2"), losses=("ln_dpo",),
        micro_batches=("few",), groups=5, seed=seed,
    )  # fmt: skip


CASES = [(family, name) for family in FAMILIES for world in (1, 2, 4) for name in layouts(family, world)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_layout_holds_the_weights_and_computes_the_logits(bench: Bench, family: str, name: str) -> None:
    found = bench.facts[family, name]
    assert [(fact.wrong, fact.direct) for fact in found] == [((), ())] * len(found)
    assert all(fact.compared for fact in found)
    reports = [fact.logits for fact in found if fact.logits is not None]
    assert reports and all(r.relative <= BOUND and r.tokens == TOKENS for r in reports), reports


@pytest.mark.parametrize("family", FAMILIES)
def test_what_megatron_core_saves_is_exported_to_the_byte(bench: Bench, family: str, tmp_path: Path) -> None:
    (saved,) = (bench.root / family / "saved").iterdir()
    shutil.copytree(bench.root / family / "ckpt" / "hf", saved / "hf")
    assert inspect(saved)["padded"]
    export_hf(saved, tmp_path / "back")
    same_folder(bench.root / family / "hf", tmp_path / "back")


def same_folder(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("family", NEW)
def test_every_gradient_equals_the_float64_oracle(bench: Bench, family: str) -> None:
    cells = bench.cells[family]
    assert len(cells) == 6 and {cell.rows for cell in cells} == {"shared", "separate"}
    assert [cell for cell in cells if not cell.ok] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_two_training_steps_from_the_folder(bench: Bench, family: str, tmp_path: Path) -> None:
    config = bench.training(family)
    run: list[dict[str, Any]] = read_metrics(config.run_dir)
    exact = oracle_steps(config.model.path, config, STEPS)
    assert [r["step"] for r in run] == [1, 2]
    for found, wanted in zip(run, exact, strict=True):
        assert found["loss"] == pytest.approx(wanted.loss, rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted.grad_norm, rel=2e-5)
    (last,) = (config.run_dir / "checkpoints").glob("step_*")
    export_hf(last, tmp_path / "out")  # the checkpoint has all that an export needs
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in config.model.path.iterdir())
