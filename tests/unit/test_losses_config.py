"""LossConfig: what each loss needs, what it may not have, and that it survives its own dump."""

from pathlib import Path
from typing import Any

import pytest

from megafuse.config.load import dump_toml, load, validate
from megafuse.config.loss import DEFAULTS, REQUIRED, LossConfig
from megafuse.errors import ConfigError

GOOD: list[dict[str, Any]] = [
    {"name": "sft"},
    {"name": "sft", "reduction": "token_mean"},
    {"name": "dpo", "beta": 0.01},
    {"name": "ln_dpo", "beta": 10, "label_smoothing": 0.1},
    {"name": "simpo", "beta": 2.5, "gamma": 0.0},
    {"name": "rloo", "beta_kl": 0},
    {"name": "rloo", "beta_kl": 1e-3, "surrogate": "clipped_ratio"},
    {"name": "rloo", "beta_kl": 1e-3, "surrogate": "clipped_ratio", "clip": 0.1},
    {"name": "wrpo", "beta": 0.01},
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_dump_reads_back(values: dict[str, Any], tmp_path: Path) -> None:
    config = validate(LossConfig, values)
    path = tmp_path / "loss.toml"
    path.write_text(dump_toml(config))
    assert load(LossConfig, path) == config == LossConfig.model_validate(config.model_dump())
    assert None not in config.settings().values() and "name" not in config.settings()


def test_defaults() -> None:
    assert LossConfig(name="sft").settings() == {"reduction": "sequence_mean"}
    assert LossConfig(name="dpo", beta=0.01).settings() == {"beta": 0.01, "label_smoothing": 0.0}
    assert LossConfig(name="wrpo", beta=0.01).settings() == {"beta": 0.01, "label_smoothing": 0.0, "alpha_max": 0.1}
    assert LossConfig(name="rloo", beta_kl=0.1).settings() == {"beta_kl": 0.1, "surrogate": "reinforce"}
    clipped = LossConfig(name="rloo", beta_kl=0.1, surrogate="clipped_ratio")
    assert clipped.settings() == {"beta_kl": 0.1, "surrogate": "clipped_ratio", "clip": 0.2}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in REQUIRED for field in REQUIRED[name]])
def test_unpublished_values_have_no_default(name: str, field: str) -> None:
    values = {other: 1.0 for other in REQUIRED[name] if other != field}
    with pytest.raises(
        ConfigError, match=rf"^{field} is missing: {name} needs it.* set loss\.{field}$|; {field} is miss"
    ):
        validate(LossConfig, {"name": name, **values})


VALUES = {"beta": 0.5, "gamma": 0.5, "label_smoothing": 0.0, "reduction": "token_mean", "beta_kl": 0.5}
VALUES |= {"surrogate": "reinforce", "clip": 0.3, "alpha_max": 0.3}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in REQUIRED for field in VALUES if field not in (*REQUIRED[name], *DEFAULTS[name])],
)
def test_a_field_without_effect_is_refused(name: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(LossConfig, {"name": name, **dict.fromkeys(REQUIRED[name], 0.1), field: VALUES[field]})
    message = str(caught.value)
    assert message.startswith(f"{field} = {VALUES[field]!r} has no effect on {name}") and "remove it" in message
    users = [n for n in REQUIRED if field in (*REQUIRED[n], *DEFAULTS[n])]
    assert (", ".join(users) or "clipped_ratio") in message


@pytest.mark.parametrize(
    "values",
    [
        {"name": "dpo", "beta": 0},
        {"name": "dpo", "beta": float("inf")},
        {"name": "dpo", "beta": float("nan")},
        {"name": "dpo", "beta": 0.1, "label_smoothing": 0.5},
        {"name": "simpo", "beta": 1, "gamma": -0.1},
        {"name": "rloo", "beta_kl": -1},
        {"name": "rloo", "beta_kl": 1, "surrogate": "ppo"},
        {"name": "rloo", "beta_kl": 1, "surrogate": "clipped_ratio", "clip": 1.0},
        {"name": "wrpo", "beta": 1, "alpha_max": 1.1},
        {"name": "sft", "reduction": "mean"},
        {"name": "orpo"},
        {"name": ["dpo"]},
        {},
        {"name": "dpo", "beta": 0.1, "betta": 1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate(LossConfig, values)


def test_every_field_belongs_to_a_loss() -> None:
    known = {field for name in REQUIRED for field in (*REQUIRED[name], *DEFAULTS[name])}
    assert set(LossConfig.model_fields) == {"name", "clip", *known}
