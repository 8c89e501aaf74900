"""Base of every configuration: frozen, no unknown field, errors that name the field, the value and the fix."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record of settings. Unknown fields are errors; the loader adds the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def decisive_settings(config: Config, *, leave_out: Iterable[str], later: Iterable[str]) -> dict[str, Any]:
    """The settings that make a result what it is, as JSON has them.

    leave_out: fields that do not. later: fields that earlier versions did not have: only where they are not at their
    default, so that results of those versions stay what they are.
    """
    fields = type(config).model_fields
    absent = {*leave_out, *(name for name in later if getattr(config, name) == fields[name].default)}
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in absent}
