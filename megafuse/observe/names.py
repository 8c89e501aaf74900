"""The names that metrics go by, so that bar, curves and tables find the same number."""

from collections.abc import Mapping
from typing import Any

_ALSO = {
    "margin": ("reward_margin", "margins"),
    "accuracy": ("preference_accuracy", "acc"),
}


def find(record: Mapping[str, Any], name: str) -> float | None:
    """The number that `record` has under `name` or one of its other names; None where there is none."""
    for key in (name, *_ALSO.get(name, ())):
        value = record.get(key)
        if isinstance(value, int | float):
            return float(value)
    return None
