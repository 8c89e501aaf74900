"""Values of a config.json, read strictly: a wrong type or range is an UnsupportedModelError that names the key."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from megafuse.errors import UnsupportedModelError


def positive_int(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """A whole number above 0; `default` where the key is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        refuse(key, value, ("a positive integer",))
    return value


def positive_float(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    """A finite number above 0; `default` where the key is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        refuse(key, value, ("a positive number",))
    return float(value)


def flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """true or false; `default` where the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        refuse(key, value, (True, False))
    return value


def same(value: Any, allowed: Any) -> bool:
    """Equality that keeps False apart from 0, but lets 0 and 0.0 be one value."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def refuse(key: str, value: Any, known: tuple[Any, ...]) -> NoReturn:
    """Raise UnsupportedModelError; `known` are the values that would do, a string among them is a description."""
    names = " or ".join(item if isinstance(item, str) else json.dumps(item) for item in known)
    raise UnsupportedModelError(f"config.json: {key} = {json.dumps(value)} is not supported; known: {names}")
