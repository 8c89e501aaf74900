"""Updates that are refused, and copies of parameters that differ."""

import math
from pathlib import Path
from typing import Any

import pytest

from megafuse.checkpoint.folder import complete_steps
from megafuse.config.train import GuardConfig, TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.observe.manifest import read_json
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed
from megafuse.testing.faults import flip_bit, glitches, poison_gradient
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training.guard import SpikeGuard

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guards")
    import_hf(write_tiny_llama(root / "hf", seed=5, layers=1), root / "model")
    import_hf(write_tiny_llama(root / "hf2", seed=5, layers=2), root / "two_layers")
    write_tiny_dataset(root / "sft", "sft", seed=6)
    return root


def config(inputs: Path, run: Path, **changes: Any) -> TrainConfig:
    settings = {"checkpoint": {"interval": 2, "keep": 9}, "global_batch_size": 4, "max_steps": 6}
    return tiny_run(run, inputs / "model", inputs / "sft", **{**settings, **changes})


def test_a_spike_is_far_above_the_median_of_a_full_window() -> None:
    guard = SpikeGuard(GuardConfig(spike_factor=3.0, spike_window=4), [])
    for norm in (1.0, 2.0, 50.0):
        assert not guard.is_spike(1e9)  # the window is not full
        guard.accept(norm)
    guard.accept(2.0)
    assert guard.is_spike(6.1) and not guard.is_spike(6.0)  # median 2
    again = SpikeGuard(GuardConfig(spike_factor=3.0, spike_window=4), guard.state)
    assert again.is_spike(6.1) and not again.is_spike(6.0)
    off = SpikeGuard(GuardConfig(), [])
    off.accept(1.0)
    assert off.state == [] and not off.is_spike(1e9)


def test_a_bad_step_rolls_back_and_comes_again_without_its_batch(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (seen,) = run_distributed(poison_gradient, 1, config(inputs, run, on_nonfinite="rollback"), 0, 4)
    assert seen["error"] is None
    records = read_metrics(run)
    assert [(r["step"], r["updated"]) for r in records] == [(s, s != 4) for s in range(1, 7)]
    assert read_json(run / "left_out.json") == [4] and complete_steps(run / "checkpoints") == [2, 4, 6]
    incident = read_json(run / "incidents" / "step_00000004.json")
    assert incident["reason"] == "not finite" and sum(len(row) for row in incident["prompt_ids"][0]) == 4
    assert incident["grad_norms"].pop("embedding") == "nan", "the poisoned gradient is its"
    assert {part: float(norm) > 0 for part, norm in incident["grad_norms"].items()} == {
        "layers.0": True,
        "final_layernorm": True,
    }
    # the same as skipping it: nothing had been updated
    run_distributed(poison_gradient, 1, config(inputs, tmp_path / "skip", on_nonfinite="skip"), 0, 4)
    skipped = read_metrics(tmp_path / "skip")
    assert [r["loss"] for r in skipped if r["step"] != 4] == [r["loss"] for r in records if r["step"] != 4]


def test_without_a_checkpoint_there_is_no_way_back(inputs: Path, tmp_path: Path) -> None:
    settings = config(inputs, tmp_path / "run", on_nonfinite="rollback", checkpoint={"interval": 0})
    (seen,) = run_distributed(poison_gradient, 1, settings, 0, 2)
    assert "there is no checkpoint to roll back to" in seen["error"]


def test_a_spike_is_skipped_with_its_prompts(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    guard = {"spike_factor": 50.0, "spike_window": 2}
    (seen,) = run_distributed(poison_gradient, 1, config(inputs, run, guard=guard), 0, 4, 1e6)
    assert seen["error"] is None and seen["changed"] is False
    assert [r["updated"] for r in read_metrics(run)] == [True, True, True, False, True, True]
    incident = read_json(run / "incidents" / "step_00000004.json")
    norms = {part: float(norm) for part, norm in incident["grad_norms"].items()}
    assert incident["reason"] == "spike" and max(norms, key=lambda part: norms[part]) == "embedding"
    assert math.hypot(*norms.values()) == pytest.approx(float(incident["grad_norm"]), rel=1e-5)


def test_a_flipped_bit_in_one_replica_is_found(inputs: Path, tmp_path: Path) -> None:
    # the distributed optimizer's next gather would repair the copy, or spread it
    changes: dict[str, Any] = {"guard": {"fingerprint_every": 2}, "optim": {"distributed": False}}
    runs = {"bad": 3, "good": 0}
    for settings, step in ((config(inputs, tmp_path / name, **changes), step) for name, step in runs.items()):
        for seen in run_distributed(flip_bit, 2, settings, 1, step):
            if step:
                assert (
                    seen.startswith("ReplicaError: step 4: copies of 1 parameters differ") and "final_layernorm" in seen
                )
            else:
                assert seen == ""
    assert complete_steps(tmp_path / "bad" / "checkpoints") == [2]


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}], ids=["dp2-overlap", "tp2", "pp2", "cp2"]
)
def test_a_step_that_cannot_be_repeated_is_found(inputs: Path, tmp_path: Path, parallel: dict[str, int]) -> None:
    overlap = {} if parallel else {"grad_reduce": True, "param_gather": True}

    def settings(name: str, **guard: int) -> TrainConfig:
        more: dict[str, Any] = {"guard": guard, "parallel": parallel, "overlap": overlap}
        return config(inputs, tmp_path / name, model={"path": inputs / "two_layers"}, max_steps=4, **more)

    every = {"replay_every": 2}
    runs = [(settings("plain"), 0, ""), (settings("good", **every), 0, ""), (settings("odd", **every), 3, "forward")]
    runs += [(settings(where, **every), 4, where) for where in ("forward", "backward")]
    for plain, good, odd, forward, backward in run_distributed(glitches, 2, 0, runs):
        assert plain == good == odd == "", "only every second step is computed twice"
        again = "ReplicaError: step 4: computed twice from the same weights, the "
        # whose losses went wrong: tensor- and context-parallel ranks hold them together, the last stage alone
        losers = "[1]" if "pipeline" in parallel else "[0, 1]" if parallel else "[0]"
        assert forward.startswith(f"{again}losses of ranks {losers} differ")
        assert backward.startswith(f"{again}gradients that ranks [")
    numbers = [[(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name)] for name in ("plain", "good")]
    assert numbers[0] == numbers[1], "computed twice, trained on once"
    for where in ("forward", "backward"):
        assert complete_steps(tmp_path / where / "checkpoints") == [2]
