"""Training under what CUDA gives megatron-core (no gloo groups, fusions, NCCL's overlaps), in one process on a CPU."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megafuse.model import build
from megafuse.observe.metrics import read_metrics
from megafuse.parallel.topology import process_groups
from megafuse.testing.as_cuda import as_on_cuda
from megafuse.testing.oracle import oracle_steps
from megafuse.testing.parity import LOSSES, TOLERANCE, Lab, differences
from megafuse.training.run import train

pytestmark = pytest.mark.distributed
STEPS = 2
SHORT = {"max_steps": STEPS, "global_batch_size": 4}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return Lab(tmp_path_factory.mktemp("as_cuda"), seed).prepare()


def test_every_loss_equals_the_float64_oracle(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = []

    def built(*args: Any, **kwargs: Any) -> Any:
        model = build.build_model(*args, **kwargs)
        settings.append(model[0].config)
        return model

    monkeypatch.setattr("megafuse.training.run.build_model", built)
    distributed = ("dpo", "rloo")  # with it parameters are gathered by the next forward
    configs = {x: lab.config(x, "run", optim={"distributed": x in distributed}, **SHORT) for x in LOSSES}
    exact = {loss: oracle_steps(lab.hf(loss), config, STEPS) for loss, config in configs.items()}
    with as_on_cuda(), process_groups():
        for config in configs.values():
            train(config)
    assert all(s.bias_activation_fusion and s.bias_dropout_fusion and s.deallocate_pipeline_outputs for s in settings)
    for loss, config in configs.items():
        base = [(step.loss, step.grad_norm) for step in exact[loss]]
        found = differences(read_metrics(config.run_dir), base, exact[loss])
        assert max(found.values()) < TOLERANCE[loss], (loss, found)
    # gpu_check asks the oracle after training: what torch has compiled by then must change nothing
    assert oracle_steps(lab.hf("sft"), configs["sft"], STEPS) == exact["sft"]


def test_a_resumed_run_is_the_same_run(lab: Lab) -> None:
    """bf16 and the distributed optimizer: what a CUDA run writes and reads back without gloo groups."""

    def numbers(run: Path) -> list[dict[str, Any]]:
        clock = ("step_seconds", "tokens_per_second", "mfu")
        return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(run)]

    config = lab.config(
        "simpo", "resumed", max_steps=4, global_batch_size=4, model={"precision": "bf16"}, optim={"distributed": True},
        checkpoint={"interval": 2, "keep": 9, "final_optimizer": True},
    )  # fmt: skip
    with as_on_cuda(), process_groups():
        train(config)
        whole = numbers(config.run_dir)
        shutil.rmtree(config.run_dir / "checkpoints" / "step_00000004")
        train(config)
    assert len(whole) == 4 and numbers(config.run_dir) == whole
