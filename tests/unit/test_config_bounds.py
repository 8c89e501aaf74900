"""Numbers that no field takes: infinities, NaN, and what overflows in fp32: in every configuration there is."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

import megafuse
from megafuse.config.base import LARGEST, Config
from megafuse.config.load import parse
from megafuse.config.train import OptimConfig, TrainConfig
from megafuse.errors import ConfigError


def classes() -> list[type[Config]]:
    """Every configuration of the package, those of `megafuse convert` and `doctor` in cli/ too."""
    root = Path(megafuse.__file__).parent
    for path in sorted([*root.glob("config/*.py"), *root.glob("cli/*.py")]):
        importlib.import_module(f"megafuse.{path.parent.name}.{path.stem}")
    found: list[type[Config]] = []
    waiting = [Config]
    while waiting:
        waiting += (new := [cls for cls in waiting.pop().__subclasses__() if cls not in found])
        found += new
    return [cls for cls in found if cls.__module__.startswith("megafuse.")]


def takes_floats(annotation: Any) -> bool:
    return annotation is float or any(takes_floats(part) for part in get_args(annotation))


def float_fields() -> Iterator[tuple[type[Config], str]]:
    for cls in classes():
        yield from ((cls, name) for name, field in cls.model_fields.items() if takes_floats(field.annotation))


def complaint(cls: type[Config], field: str, value: float) -> str:
    """What the configuration says about the field; others may be missing."""
    containers = {"alpha": (value,)} if cls.__name__ == "GridConfig" else {}
    with pytest.raises(ValidationError) as caught:
        cls.model_validate({field: containers.get(field, value)})
    return "; ".join(error["msg"] for error in caught.value.errors() if error["loc"][:1] == (field,))


def test_no_field_takes_what_is_not_finite_or_overflows_in_fp32() -> None:
    fields = [(cls, name) for cls, name in float_fields() if name != "template_kwargs"]  # a template's own business
    assert len(fields) > 35 and (OptimConfig, "lr") in fields
    for cls, name in fields:
        for value in (float("inf"), float("-inf"), float("nan"), 1e38, -1e38):
            assert complaint(cls, name, value), f"{cls.__name__}.{name} = {value}"


def test_the_largest_number_is_one_that_fp32_can_square() -> None:
    assert LARGEST**2 < 3.4e38
    assert OptimConfig(lr=LARGEST, clip_grad=LARGEST).clip_grad == LARGEST


ARGUMENTS = ["--run_dir", "run", "--model.path", "m", "--data.dataset", "d", "--loss.name", "sft"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--optim.lr", "inf"], ["optim.lr = inf", "finite number"]),
        (["--optim.lr", "1e38"], ["optim.lr = 1e+38", "overflow", "1e+18"]),
        (
            ["--optim.lr", "1e-5", "--optim.min_lr", "1e-4"],
            ["optim.min_lr = 0.0001", "above optim.lr = 1e-05"],
        ),
        (["--optim.lr", "1", "--optim.eps", "1e-46"], ["optim.eps = 1e-46"]),
        (["--optim.lr", "1", "--guard.spike_factor", "nan"], ["guard.spike_factor = nan", "finite"]),
        (["--optim.lr", "1", "--guard.hang_seconds", "1e12"], ["guard.hang_seconds = 1000000000000.0"]),
        (["--optim.lr", "1", "--seed", str(1 << 63)], [f"seed = {1 << 63}", "less than"]),  # torch takes 64 bits
    ],
)
def test_the_message_names_field_and_value(given: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(TrainConfig, [*ARGUMENTS, *given], prog="megafuse train", description="")
    assert all(word in str(caught.value) for word in words), str(caught.value)
