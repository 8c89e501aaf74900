"""A run goes on with the configuration that it began with, or says what has changed."""

import difflib
from pathlib import Path
from typing import Any

from megafuse.config.load import dump_toml, load
from megafuse.config.train import TrainConfig
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


def began_precision(run_dir: Path) -> str | None:
    """`model.precision` that the run in `run_dir` began with; None where there is no run, or none that has decided.

    Raises ConfigError.
    """
    path = run_dir / CONFIG_FILE
    precision = load(TrainConfig, path).model.precision if path.is_file() else "auto"
    return None if precision == "auto" else precision


def refuse_drift(config: TrainConfig, after_step: int = 0) -> list[dict[str, Any]]:
    """Write the resolved config into a new run folder; in one that has it, compare. One process only.

    Returns every change that `allow_change` has let through so far: field, began, now, and the step it came after.

    Raises:
        ConfigError: field by field, the value that the run began with and the value given now; or `allow_change` names
            what is no field.
    """
    path = config.run_dir / CONFIG_FILE
    now = _flat(config.model_dump(mode="json"))
    for name in config.allow_change:
        if name not in now:
            close = difflib.get_close_matches(name, now, n=1)
            raise ConfigError(
                f"allow_change = {name!r} is no field" + (f"; did you mean {close[0]!r}?" if close else "")
            )
    known = config.run_dir / CHANGES
    changes: list[dict[str, Any]] = read_json(known) if known.is_file() else []
    if not path.is_file():
        _write(config)
        return changes
    began = load(TrainConfig, path)
    if began.model.precision == "auto":  # put here by hand: decided by this start
        model = began.model.model_copy(update={"precision": config.model.precision})
        began = began.model_copy(update={"model": model})
        _write(began)
    before = _flat(began.model_dump(mode="json"))
    changed = [key for key in now if before.get(key) != now[key] and not _is_free(key)]
    if refused := [key for key in changed if key not in config.allow_change]:
        lines = [f"  {key}: began with {before.get(key)!r}, now {now[key]!r}" for key in refused]
        raise ConfigError(
            f"{config.run_dir} is a run with another configuration:\n"
            + "\n".join(lines)
            + f"\ngive the same values, or another run_dir, or allow it: --allow_change {' '.join(refused)}"
        )
    if changed:
        changes += [
            {"field": key, "began": before.get(key), "now": now[key], "after_step": after_step, "time": utc_now()}
            for key in changed
        ]
        write_json_atomic(known, changes)  # first: a kill between the two tells it twice, not never
        _write(config)
    return changes


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
