"""Every loss, at every layout, against one process; one process against a float64 oracle without Megatron."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.oracle import OracleStep, oracle_steps
from megafuse.testing.tiny import write_tiny_dataset, write_tiny_llama

pytestmark = pytest.mark.distributed

STEPS = 5
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "sft_token_mean": {"name": "sft", "reduction": "token_mean"},
    "sft_sum": {"name": "sft", "reduction": "sequence_sum"},
    "dpo": {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    "ln_dpo": {"name": "ln_dpo", "beta": 3.0},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 0.5},
    "rloo": {"name": "rloo", "beta_kl": 0.05},
    "rloo_clipped": {"name": "rloo", "beta_kl": 0.05, "surrogate": "clipped_ratio"},
    "wrpo": {"name": "wrpo", "beta": 0.2, "alpha_max": 0.5},
}
KINDS = {"sft": "sft", "rloo": "rloo", "wrpo": "wrpo"}
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {  # world size, parallel, distributed optimizer
    "dp2": (2, {}, False),
    "dp2_distributed_optimizer": (2, {}, True),
    "tp2": (2, {"tensor": 2}, True),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}, False),
    "pp2": (2, {"pipeline": 2}, True),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}, True),
    "tp2_sp_dp2": (4, {"tensor": 2, "sequence": True}, True),
    "pp2_dp2": (4, {"pipeline": 2}, True),
}


class Lab:
    """A tiny model, data sets of every kind, and runs in a scratch folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        seed = int.from_bytes(os.urandom(4), "little")
        print("seed", seed)
        self.hf, self.model = {}, {}
        for tied in (True, False):
            self.hf[tied] = write_tiny_llama(root / f"hf-{tied}", seed=seed, tied=tied)
            self.model[tied] = root / f"model-{tied}"
            import_hf(self.hf[tied], self.model[tied])
        self.data = {
            kind: write_tiny_dataset(root / kind, kind, seed=seed + i)
            for i, kind in enumerate(("sft", "pair", "rloo", "wrpo"))
        }

    def config(self, loss: str, run: str, *, tied: bool = True, **changes: Any) -> TrainConfig:
        kind = KINDS.get(LOSSES[loss]["name"], "pair")
        distributed = changes.pop("distributed", True)
        return TrainConfig.model_validate(
            {
                "run_dir": self.root / "runs" / f"{loss}-{run}",
                "model": {"path": self.model[tied], "precision": "fp32", **changes.pop("model", {})},
                "data": {"dataset": self.data[kind], "max_row_tokens": 256, **changes.pop("data", {})},
                "loss": LOSSES[loss],
                "optim": {"lr": 2e-3, "weight_decay": 0.1, "beta2": 0.95, "distributed": distributed, "clip_grad": 0.5},
                "checkpoint": {"interval": 0, "final_optimizer": False},
                "observe": {"tensorboard": False},
                "global_batch_size": 8,
                "epochs": 3,
                "max_steps": STEPS,
                **changes,
            }
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def single(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    """Metrics of one process for every loss."""
    configs = {loss: lab.config(loss, "single", tied=loss != "dpo") for loss in LOSSES}
    run_distributed(run_trainings, 1, list(configs.values()))
    return {loss: read_metrics(config.run_dir) for loss, config in configs.items()}


@pytest.fixture(scope="module")
def oracle(lab: Lab) -> dict[str, list[OracleStep]]:
    """The same steps in float64 without Megatron."""
    return {
        loss: oracle_steps(lab.hf[loss != "dpo"], lab.config(loss, "oracle", tied=loss != "dpo"), STEPS)
        for loss in LOSSES
    }


def assert_same(run: list[dict[str, Any]], base: list[dict[str, Any]], exact: list[OracleStep]) -> None:
    """Relative 1e-5, the loss relative to its magnitude (see OracleStep: they differ for RLOO only)."""
    assert [r["step"] for r in run] == [r["step"] for r in base] == list(range(1, STEPS + 1))
    for ours, theirs, size in zip(run, base, exact, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5 * size.magnitude), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), ours["step"]
        assert ours["lr"] == theirs["lr"] and ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_equals_the_float64_oracle(single: dict[str, Any], oracle: dict[str, Any], loss: str) -> None:
    for ours, exact in zip(single[loss], oracle[loss], strict=True):
        assert ours["loss"] == pytest.approx(exact.loss, abs=1e-5 * exact.magnitude)
        assert "rloo" in loss or exact.magnitude == pytest.approx(abs(exact.loss), rel=1e-12)
        assert ours["grad_norm"] == pytest.approx(exact.grad_norm, rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_equals_one_process(lab: Lab, single: dict[str, Any], oracle: dict[str, Any], world: int) -> None:
    layouts = {k: v for k, v in LAYOUTS.items() if v[0] == world}
    configs = {
        (loss, name): lab.config(loss, name, tied=loss != "dpo", parallel=parallel, distributed=distributed)
        for loss in LOSSES
        for name, (_, parallel, distributed) in layouts.items()
    }
    run_distributed(run_trainings, world, list(configs.values()), timeout=500)
    for (loss, name), config in configs.items():
        print(loss, name)
        assert_same(read_metrics(config.run_dir), single[loss], oracle[loss])


@pytest.mark.parametrize("loss", ["sft_token_mean", "ln_dpo", "rloo"])
def test_micro_batches_packing_and_prefix_sharing_change_nothing(
    lab: Lab, single: dict[str, Any], oracle: dict[str, Any], loss: str
) -> None:
    longest = json.loads((lab.config(loss, "x").data.dataset / "manifest.json").read_text())["max_group_tokens"]
    ways = {
        "one_row": {"data": {"max_row_tokens": 8192}},
        "small_rows": {"data": {"max_row_tokens": longest}},
        "unshared": {"data": {"max_row_tokens": 300, "prefix_sharing": False}},
        "unshared_one_row": {"data": {"max_row_tokens": 8192, "prefix_sharing": False}},
        "recompute_full": {"model": {"recompute": "full"}},
        "recompute_selective": {"model": {"recompute": "selective"}},
    }
    configs = {way: lab.config(loss, way, **changes) for way, changes in ways.items()}
    run_distributed(run_trainings, 1, list(configs.values()))
    for way, config in configs.items():
        run = read_metrics(config.run_dir)
        print(way, [r["tokens_computed"] for r in run])
        assert_same(run, single[loss], oracle[loss])


@pytest.mark.parametrize("loss", ["dpo", "ln_dpo", "wrpo"])
def test_first_loss_is_ln_2_when_the_policy_is_the_reference(single: dict[str, Any], loss: str) -> None:
    assert single[loss][0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
