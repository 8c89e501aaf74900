"""A run goes on with the configuration that it began with, or says what has changed."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megafuse.config.load import dump_toml, load
from megafuse.config.loss import LossConfig
from megafuse.config.train import OptimConfig, TrainConfig
from megafuse.errors import ConfigError
from megafuse.observe.manifest import atomic_file, read_json, utc_now, write_json_atomic

CONFIG_FILE = "config.toml"
CHANGES = "changes.json"
# What may change between two starts of one run: where and how it is computed, told and kept. Its numbers change by no
# more than the order of additions does. A name frees the field, or all fields of the section.
FREE = (
    "run_dir",
    "allow_change",
    "checkpoint",
    "observe",
    "guard",
    "on_nonfinite",
    "max_consecutive_skips",
    "parallel",
    "overlap",
    "model.attention",
    "model.layers",
    "model.recompute",
    "data.max_row_tokens",
    "data.max_group_tokens",
    "data.prefix_sharing",
    "optim.distributed",
)
# What `allow_change` lets through: each acts from the next step on, on the schedule, the loss or the evaluation.
ACTS = (
    *(f"optim.{name}" for name in OptimConfig.model_fields if name != "distributed"),
    *(f"loss.{name}" for name in LossConfig.model_fields),
    "epochs",
    "max_steps",
    "reference.path",
    "reference.model",
    "held_out.dataset",
)
# What even `allow_change` does not let through once a checkpoint has been written, and why.
BOUND: Mapping[str, str] = {
    "model.path": "the weights are those of the run's newest checkpoint, whatever this says; let through is another "
    "place of the same model",
    "model.precision": "the run's weights, optimizer state and reference log-probs are of the precision that it began "
    "with",
    "data.dataset": "the steps done were taken from it, the coming ones go on behind them; let through is another "
    "place of the same data",
    "global_batch_size": "the steps done were counted in batches of the old size: prompts would come twice, or never",
    "seed": "the steps done were taken in the old order: prompts would come twice, or never",
}


def began_precision(run_dir: Path) -> str | None:
    """`model.precision` that the run in `run_dir` began with; None where there is no run, or none that has decided.

    Raises ConfigError.
    """
    path = run_dir / CONFIG_FILE
    precision = load(TrainConfig, path).model.precision if path.is_file() else "auto"
    return None if precision == "auto" else precision


def find_drift(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What differs from what the run folder began with, all of it let through: {field: (began, now)}. Writes nothing.

    Raises:
        ConfigError: field by field, the value that the run began with and the value given now; or `allow_change` names
            what is no field.
    """
    now = _flat(config.model_dump(mode="json"))
    for name in config.allow_change:
        if name not in now:
            close = difflib.get_close_matches(name, now, n=1)
            raise ConfigError(
                f"allow_change = {name!r} is no field" + (f"; did you mean {close[0]!r}?" if close else "")
            )
    began = _began(config)
    before = now if began is None else _flat(began.model_dump(mode="json"))
    changed = {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key] and not _is_free(key)}
    if refused := {key: values for key, values in changed.items() if key not in config.allow_change}:
        raise ConfigError(
            f"{config.run_dir} is a run with another configuration:\n"
            + "\n".join(f"  {_told(key, values)}" for key, values in refused.items())
            + f"\ngive the same values, or another run_dir, or allow it: --allow_change {' '.join(refused)}"
        )
    return changed


def refuse_bound(
    changed: Mapping[str, tuple[Any, Any]], after_step: int, same: Callable[[str, Any, Any], bool]
) -> None:
    """Refuse those of the changes that steps already done do not allow. Without a checkpoint, step 0, every one may be.

    same: whether a field that names a folder means the same content now as before: (field, began, now).

    Raises:
        ConfigError: field by field, with the reason and the fix.
    """
    bound = {key: values for key, values in changed.items() if key in BOUND and after_step}
    if refused := {key: values for key, values in bound.items() if not same(key, *values)}:
        raise ConfigError(
            f"the run has done {after_step} steps, and not even allow_change lets this through:\n"
            + "\n".join(f"  {_told(key, values)}: {BOUND[key]}" for key, values in refused.items())
            + "\ngive the same values, or begin in another run_dir with model.path = the newest checkpoint of this one"
        )


def _told(key: str, values: tuple[Any, Any]) -> str:
    return f"{key}: began with {values[0]!r}, now {values[1]!r}"


def bind(config: TrainConfig, changed: Mapping[str, tuple[Any, Any]], after_step: int) -> list[dict[str, Any]]:
    """Write the resolved config into a run folder that has none, or is `changed`. One process only.

    Returns every change that `allow_change` has let through so far: field, began, now, and the step it came after.
    """
    known = config.run_dir / CHANGES
    changes: list[dict[str, Any]] = read_json(known) if known.is_file() else []
    if changed:
        changes += [
            {"field": key, "began": began, "now": now, "after_step": after_step, "time": utc_now()}
            for key, (began, now) in changed.items()
        ]
        write_json_atomic(known, changes)  # first: a kill between the two tells it twice, not never
    decided = _began(config)
    if changed or decided is None:
        _write(config)
    elif decided != load(TrainConfig, config.run_dir / CONFIG_FILE):
        _write(decided)
    return changes


def _began(config: TrainConfig) -> TrainConfig | None:
    """What the run folder began with, if it did; `auto` (put there by hand) as this start has decided it."""
    path = config.run_dir / CONFIG_FILE
    if not path.is_file():
        return None
    began = load(TrainConfig, path)
    if began.model.precision == "auto":
        model = began.model.model_copy(update={"precision": config.model.precision})
        began = began.model_copy(update={"model": model})
    return began


def _write(config: TrainConfig) -> None:
    with atomic_file(config.run_dir / CONFIG_FILE) as file:
        file.write(dump_toml(config.model_copy(update={"allow_change": ()})).encode())


def _is_free(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in FREE)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
