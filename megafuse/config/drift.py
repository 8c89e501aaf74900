"""A run goes on with the configuration that it began with, or says what has changed."""

from typing import Any

from megafuse.config.load import dump_toml, load
from megafuse.config.train import TrainConfig
from megafuse.errors import ConfigError
from megafuse.observe.manifest import atomic_file

CONFIG_FILE = "config.toml"
# What may change between two starts of one run: where and how it is computed, told and kept. Its numbers change by no
# more than the order of additions does. A name frees the field, or all fields of the section.
FREE = (
    "run_dir",
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


def refuse_drift(config: TrainConfig) -> None:
    """Write the resolved config into a new run folder; in one that has it, compare. One process only.

    Raises:
        ConfigError: field by field, the value that the run began with and the value given now.
    """
    path = config.run_dir / CONFIG_FILE
    if not path.is_file():
        with atomic_file(path) as file:
            file.write(dump_toml(config).encode())
        return
    before = _flat(load(TrainConfig, path).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    changed = [key for key in now if before.get(key) != now[key] and not _is_free(key)]
    if changed:
        lines = [f"  {key}: began with {before.get(key)!r}, now {now[key]!r}" for key in changed]
        raise ConfigError(
            f"{config.run_dir} is a run with another configuration:\n"
            + "\n".join(lines)
            + "\ngive the same values, or another run_dir"
        )


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
