"""What may change between two starts of one run, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from megafuse.config.drift import CONFIG_FILE, FREE, bind, find_drift
from megafuse.config.train import TrainConfig
from megafuse.errors import ConfigError


def config(run: Path, **changes: Any) -> TrainConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": "model", "precision": "bf16"},
        "data": {"dataset": "data"},
        "loss": {"name": "dpo", "beta": 0.3},
        "optim": {"lr": 1e-3},
    }
    for section, values in sections.items():
        values |= changes.pop(section, {})
    return TrainConfig.model_validate({"run_dir": run, **sections, **changes})


ALLOWED: dict[str, dict[str, Any]] = {
    "layout": {"parallel": {"tensor": 2, "sequence": True, "pipeline": 4, "virtual_pipeline": 2, "context": 2}},
    "uneven": {"parallel": {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 5}, "overlap": {"p2p": False}},
    "experts": {"parallel": {"expert": 2}, "overlap": {"grad_reduce": True, "param_gather": True, "tensor": False}},
    "rows": {"data": {"max_row_tokens": 4096, "max_group_tokens": 5000, "prefix_sharing": False}},
    "computation": {"model": {"recompute": "full", "attention": "sdpa", "layers": "torch"}},
    "optimizer_sharding": {"optim": {"distributed": False}},
    "bookkeeping": {"checkpoint": {"interval": 7}, "observe": {"wandb": True}, "on_nonfinite": "skip"},
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": 9}, "seed: began with 0, now 9"),
    ({"global_batch_size": 64}, "global_batch_size: began with 128, now 64"),
    ({"max_steps": 10}, "max_steps: began with None, now 10"),
    ({"epochs": 2}, "epochs: began with 1, now 2"),
    ({"model": {"path": "other"}}, "model.path: began with 'model', now 'other'"),
    ({"model": {"precision": "fp32"}}, "model.precision: began with 'bf16', now 'fp32'"),
    ({"data": {"dataset": "other"}}, "data.dataset: began with 'data', now 'other'"),
    ({"loss": {"beta": 0.1}}, "loss.beta: began with 0.3, now 0.1"),
    ({"optim": {"lr": 2e-3}}, "optim.lr: began with 0.001, now 0.002"),
    ({"optim": {"clip_grad": 2.0}}, "optim.clip_grad: began with 1.0, now 2.0"),
    ({"reference": {"path": "cache"}}, "reference.path: began with None, now 'cache'"),
]


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED)
def test_how_and_where_a_run_is_computed_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    bind(config(tmp_path), {}, 0)
    before = (tmp_path / CONFIG_FILE).read_bytes()
    assert find_drift(config(tmp_path, **changes)) == {}
    bind(config(tmp_path, **changes), {}, 1)
    assert (tmp_path / CONFIG_FILE).read_bytes() == before  # what the run began with


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_the_run_computes_may_not(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bind(config(tmp_path), {}, 0)
    with pytest.raises(ConfigError) as caught:
        find_drift(config(tmp_path, **changes, parallel={"tensor": 2}))
    assert message in str(caught.value)
    assert "parallel" not in str(caught.value)  # only what is in the way
    assert "or another run_dir" in str(caught.value)


def test_every_free_name_is_a_field() -> None:
    for name in FREE:
        fields: Any = TrainConfig.model_fields
        for part in name.split("."):
            assert part in fields, name
            fields = getattr(fields[part].annotation, "model_fields", {})
