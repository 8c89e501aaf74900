"""Base of every configuration: frozen, no unknown field, errors that name the field, the value and the fix."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record of settings. Unknown fields are errors; the loader adds the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
