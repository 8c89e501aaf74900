"""Base of every configuration: frozen, no unknown field, no endless number, errors that name field, value and fix."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 1e18
"""The product of two such numbers still fits fp32, in which most of them are used."""


class Config(BaseModel):
    """A frozen record of settings. Unknown fields are errors; the loader adds the nearest known name.

    No number is infinite or NaN, none beyond `LARGEST` or its negative.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _fits_fp32(cls, value: Any) -> Any:
        for number in value if isinstance(value, Iterable) and not isinstance(value, str) else (value,):
            if isinstance(number, float) and abs(number) > LARGEST:
                raise ValueError(f"no number may be beyond {LARGEST:g}: it would overflow where it is used, in fp32")
        return value


def decisive_settings(config: Config, *, leave_out: Iterable[str], later: Iterable[str]) -> dict[str, Any]:
    """The settings that make a result what it is, as JSON has them.

    leave_out: fields that do not. later: fields that earlier versions did not have: only where they are not at their
    default, so that results of those versions stay what they are.
    """
    fields = type(config).model_fields
    absent = {*leave_out, *(name for name in later if getattr(config, name) == fields[name].default)}
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in absent}
