"""A state that is NaN or infinite, whatever made it so, becomes no checkpoint, and no weights to start from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.checkpoint.finite import non_finite
from megafuse.checkpoint.folder import complete_steps
from megafuse.checkpoint.saver import Saver
from megafuse.config.train import TrainConfig
from megafuse.errors import IntegrityError, NonFiniteError
from megafuse.observe.manifest import read_json
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.faults import spoil_states
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training.run import train

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad_states")
    write_tiny_llama(root / "model", seed=5, layers=1)
    write_tiny_dataset(root / "sft", "sft", seed=6)
    return root


def config(inputs: Path, run: Path, **changes: Any) -> TrainConfig:
    checkpoint = {"interval": 2, "keep": 9, **changes.pop("checkpoint", {})}
    settings = {"checkpoint": checkpoint, "global_batch_size": 4, "max_steps": 4, "optim": {"distributed": False}}
    return tiny_run(run, inputs / "model", inputs / "sft", **{**settings, **changes})


def numbers(run: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run)]


BF16 = {"model": {"precision": "bf16"}}
CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "last": ({}, 4, "weight"),
    "first": ({}, 2, "weight"),
    "async": ({"checkpoint": {"async_save": True}, "max_steps": 6}, 4, "weight"),
    "moment": ({"parallel": {"tensor": 2}}, 4, "moment"),
    "moment_sharded": ({"optim": {"distributed": True}}, 4, "moment"),
    "master": ({**BF16}, 4, "master"),
    "master_sharded": ({**BF16, "optim": {"distributed": True}}, 4, "master"),
    "stop": ({}, 3, "stop"),
    "rollback": ({"on_nonfinite": "rollback"}, 4, "weight"),
    "no_way_back": ({"on_nonfinite": "rollback"}, 2, "weight"),
    "skip": ({"on_nonfinite": "skip"}, 4, "weight"),
    "weights_only": ({"checkpoint": {"final_optimizer": False}}, 4, "moment"),
}


def test_no_checkpoint_of_a_state_that_is_bad_on_one_rank(inputs: Path, tmp_path: Path) -> None:
    configs = {name: config(inputs, tmp_path / name, **changes) for name, (changes, _, _) in CASES.items()}
    first, second = run_distributed(
        spoil_states, 2, [(configs[name], 1, step, what) for name, (_, step, what) in CASES.items()]
    )
    assert first == second, "every rank, the same words"
    errors, saved = dict(zip(CASES, first)), {}
    for name in CASES:
        root = tmp_path / name / "checkpoints"
        saved[name] = complete_steps(root)
        assert not list(root.glob("*.tmp"))
    for name in ("last", "async", "skip"):
        told = "NonFiniteError: step 4: no checkpoint is written, these are NaN or infinite: decoder.final_layernorm"
        assert errors[name].startswith(f"{told}.weight (rank 1). The newest good one is of step 2: a new start")
        assert "optim.lr" in errors[name] and saved[name] == [2]
    for name, kind in {"moment": "exp_avg", "moment_sharded": "exp_avg", "master": "fp32_param",
                       "master_sharded": "param"}.items():  # fmt: skip
        assert f"NaN or infinite: optimizer.state.{kind}." in errors[name] and saved[name] == [2], errors[name]
    assert "of step 3" not in errors["stop"] and "step 3: no checkpoint" in errors["stop"] and saved["stop"] == [2]
    assert "There is none." in errors["first"] and saved["first"] == []
    assert "there is no checkpoint to roll back to" in errors["no_way_back"] and saved["no_way_back"] == []
    assert errors["weights_only"] == "" and saved["weights_only"] == [2, 4]  # what is not saved is not asked about

    # rolled back, without that batch
    assert errors["rollback"] == "" and saved["rollback"] == [2, 4]
    assert read_json(tmp_path / "rollback" / "left_out.json") == [4]
    assert [record["updated"] for record in read_metrics(tmp_path / "rollback")] == [True, True, True, False]

    # from the last good one on it is the run that was never disturbed
    run_distributed(run_trainings, 2, [config(inputs, tmp_path / "whole"), configs["last"], configs["stop"]])
    for name in ("last", "stop"):
        assert complete_steps(tmp_path / name / "checkpoints") == [2, 4]
        assert numbers(tmp_path / name) == numbers(tmp_path / "whole")


def test_the_exit_code_is_that_of_a_step_that_is_not_finite() -> None:
    assert NonFiniteError.exit_code == 86


def spoil(folder: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_to_start_from_are_looked_at_before_the_first_step(inputs: Path, tmp_path: Path, value: float) -> None:
    """Such as a row of the embedding that no prompt has: its loss would be a number."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    spoil(tmp_path / "model", "model.embed_tokens.weight", value)
    bad = config(inputs, tmp_path / "run", model={"path": tmp_path / "model"})
    with pytest.raises(IntegrityError, match=r"model holds weights that are NaN or infinite: embedding.*rank 0"):
        train(bad)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_bad_checkpoint_of_before_is_not_gone_on_from(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:  # as a version wrote it that did not look
        earlier.setattr(Saver, "_refuse_non_finite", lambda *_: None)
        bad = (config(inputs, tmp_path / "run"), 0, 4, "weight")
        assert run_distributed(spoil_states, 1, [bad]) == [[""]]
    longer = config(inputs, tmp_path / "run", max_steps=6, allow_change=("max_steps",))
    with pytest.raises(
        IntegrityError, match=r"step_00000004 holds weights that are NaN or infinite: .*: remove it, and"
    ):
        train(longer)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    train(longer)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2, 4, 6]


def test_a_number_that_is_not_finite_is_found_wherever_it_stands() -> None:
    class Alone:
        """A world of one."""

        rank = 0

        def all_agree(self, ok: bool) -> bool:
            return ok

        def gather_on_rank_zero(self, value: Any) -> list[Any]:
            return [value]

        def from_rank_zero(self, value: Any) -> Any:
            return value

    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        for size in (1, 7, 64, 1000):
            tensor = torch.randn(size, generator=generator).to(dtype)
            tensor[0] = largest  # a sum of such would overflow
            tensor[-1] = -largest
            assert non_finite([("good", tensor), ("none", torch.zeros(0)), ("int", torch.ones(2).int())], Alone()) == []
            for value in (float("nan"), float("inf"), float("-inf")):
                bad = tensor.clone()
                bad[int(torch.randint(size, (), generator=generator))] = value
                assert non_finite([("good", tensor), ("bad", bad)], Alone()) == ["bad (rank 0)"]
