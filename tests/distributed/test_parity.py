"""Every loss, at every layout, against one process; one process against a float64 oracle without Megatron."""

import json
import os
from typing import Any

import pytest

from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.oracle import OracleStep, oracle_steps
from megafuse.testing.parity import LOSSES, STEPS, TOLERANCE, Lab, differences, steps_of

pytestmark = pytest.mark.distributed

OVERLAP = {"grad_reduce": True, "param_gather": True}  # what NCCL gets by default
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {  # world size, parallel, distributed optimizer
    "dp2": (2, {}, False),
    "dp2_distributed_optimizer": (2, {}, True),
    "dp2_overlap": (2, {}, True),
    "tp2": (2, {"tensor": 2}, True),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}, False),
    "pp2": (2, {"pipeline": 2}, True),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}, True),
    "tp2_sp_dp2": (4, {"tensor": 2, "sequence": True}, True),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return Lab(tmp_path_factory.mktemp("parity"), seed).prepare()


@pytest.fixture(scope="module")
def single(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    """Metrics of one process for every loss."""
    configs = {loss: lab.config(loss, "single") for loss in LOSSES}
    run_distributed(run_trainings, 1, list(configs.values()), timeout=550)
    return {loss: read_metrics(config.run_dir) for loss, config in configs.items()}


@pytest.fixture(scope="module")
def oracle(lab: Lab) -> dict[str, list[OracleStep]]:
    """The same steps in float64 without Megatron."""
    return {loss: oracle_steps(lab.hf(loss), lab.config(loss, "oracle"), STEPS) for loss in LOSSES}


def assert_same(loss: str, run: list[dict[str, Any]], base: list[dict[str, Any]], exact: list[OracleStep]) -> None:
    assert [r["step"] for r in run] == list(range(1, STEPS + 1))
    found = differences(run, steps_of(base), exact)
    assert max(found.values()) < TOLERANCE[loss], found
    assert [(r["lr"], r["tokens"], r["prompts"]) for r in run] == [(r["lr"], r["tokens"], r["prompts"]) for r in base]


@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_equals_the_float64_oracle(single: dict[str, Any], oracle: dict[str, Any], loss: str) -> None:
    found = differences(single[loss], [(s.loss, s.grad_norm) for s in oracle[loss]], oracle[loss])
    assert max(found.values()) < TOLERANCE[loss], found
    if "rloo" not in loss:
        assert all(s.magnitude == pytest.approx(abs(s.loss), rel=1e-12) for s in oracle[loss])


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_equals_one_process(lab: Lab, single: dict[str, Any], oracle: dict[str, Any], world: int) -> None:
    layouts = {k: v for k, v in LAYOUTS.items() if v[0] == world}
    configs = {
        (loss, name): lab.config(
            loss,
            name,
            parallel=parallel,
            optim={"distributed": distributed},
            overlap=OVERLAP if "overlap" in name else {},
        )
        for loss in LOSSES
        for name, (_, parallel, distributed) in layouts.items()
    }
    run_distributed(run_trainings, world, list(configs.values()), timeout=550)
    for (loss, name), config in configs.items():
        print(loss, name)
        assert_same(loss, read_metrics(config.run_dir), single[loss], oracle[loss])


@pytest.mark.parametrize("loss", ["sft_token_mean", "ln_dpo", "rloo"])
def test_micro_batches_packing_and_prefix_sharing_change_nothing(
    lab: Lab, single: dict[str, Any], oracle: dict[str, Any], loss: str
) -> None:
    longest = json.loads((lab.config(loss, "x").data.dataset / "manifest.json").read_text())["max_group_tokens"]
    ways: dict[str, dict[str, Any]] = {
        "one_row": {"data": {"max_row_tokens": 8192}},
        "small_rows": {"data": {"max_row_tokens": longest}},
        "unshared": {"data": {"max_row_tokens": 40, "prefix_sharing": False}},
        "unshared_one_row": {"data": {"max_row_tokens": 8192, "prefix_sharing": False}},
        "recompute_full": {"model": {"recompute": "full"}},
        "recompute_selective": {"model": {"recompute": "selective"}},
    }
    configs = {way: lab.config(loss, way, **changes) for way, changes in ways.items()}
    run_distributed(run_trainings, 1, list(configs.values()))
    for way, config in configs.items():
        run = read_metrics(config.run_dir)
        print(way, [r["tokens_computed"] for r in run])
        assert_same(loss, run, single[loss], oracle[loss])


@pytest.mark.parametrize("loss", ["ln_dpo", "wrpo"])
def test_first_loss_is_ln_2_when_the_policy_is_the_reference(single: dict[str, Any], loss: str) -> None:
    assert single[loss][0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)


def test_first_loss_of_smoothed_dpo_is_ln_2_too(single: dict[str, Any]) -> None:
    assert single["dpo"][0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
