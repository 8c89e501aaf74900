"""The gradient norm at real sizes against float64, and how often a step waits for the device to hear of it."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megafuse.converters.importer import import_hf
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed
from megafuse.testing.faults import error_with_step
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training import grad_norms
from megafuse.training.step import train_step

WAITS = ("tolist", "cpu", "numpy")  # what asks a device for numbers; item, float, bool and int end in one ATen operator


MAKE = torch.tensor  # the CPU runtime puts another function in its place, which calls this one


def fresh_seed() -> int:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return seed


def leaves(nested: Any) -> Iterator[Any]:
    for item in nested if isinstance(nested, list) else [nested]:
        yield from leaves(item) if isinstance(item, list) else [item]


class Waits:
    """Counts what would make the host wait for a device, between `start` and `stop`."""

    def __init__(self) -> None:
        waits = self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                waits.count += func is torch.ops.aten._local_scalar_dense.default
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                waits.count += getattr(func, "__name__", "") in WAITS
                if func is MAKE:  # of tensors, one by one
                    waits.count += sum(isinstance(x, torch.Tensor) for x in leaves(args[0]))
                return func(*args, **(kwargs or {}))

        self.count, self.modes = 0, (Operators(), Methods())

    def start(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def stop(self) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def gradients(engine: Any) -> list[torch.Tensor]:
    return [p.main_grad for chunk in engine.bare for p in chunk.parameters()]


def exact_norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(float(np.square(t.numpy(), dtype=np.float64).sum()) for t in tensors))


def train_with(tmp_path: Path, step: Callable[..., Any], **sizes: int) -> Path:
    """One update of a Llama of `sizes` with `step` in the place of the step."""
    import_hf(write_tiny_llama(tmp_path / "hf", seed=0, **sizes), tmp_path / "model")
    data = write_tiny_dataset(tmp_path / "data", "sft", seed=0, groups=2)
    config = tiny_run(
        tmp_path / "run", tmp_path / "model", data,
        global_batch_size=2, max_steps=1, checkpoint={"final_optimizer": False},
    )  # fmt: skip
    assert run_distributed(error_with_step, 1, config, step) == [""]
    return tmp_path / "run"


def test_a_step_clips_by_and_reports_the_norm_of_28_million_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh random gradients take the place of the step's own; the update is clipped to 1. An fp32 norm is caught."""
    seed, seen = fresh_seed(), {}

    def fp32(gradient: torch.Tensor, total: torch.Tensor, *_: Any) -> None:
        total.add_(torch.norm(gradient).square())

    def step(engine: Any, topology: Any, *args: Any, **kwargs: Any) -> Any:
        def check(outputs: Any, again: Any) -> Any:
            generator = torch.Generator().manual_seed(seed)
            for gradient in gradients(engine):
                gradient.normal_(0, 1e-2, generator=generator)
            seen["exact"] = exact_norm(gradients(engine))
            with monkeypatch.context() as fault:
                fault.setattr(grad_norms, "add_squares", fp32)
                seen["planted"] = grad_norms.total_norm(grad_norms.grad_norms(engine, topology))
            return outputs

        result = train_step(engine, topology, *args, **kwargs, check=check)
        seen["clipped"] = exact_norm(gradients(engine))
        return result

    run = train_with(tmp_path, step, layers=1, hidden=576, heads=9, kv_heads=3, vocab=49152)
    (record,) = read_metrics(run)
    reported, planted = (abs(norm / seen["exact"] - 1) for norm in (record["grad_norm"], seen["planted"]))
    print("reported", reported, "clipped", seen["clipped"] - 1, "planted", planted)
    assert reported < 1e-12 < 1e-6 < planted
    # the rule divides by norm + 1e-6, and each element rounds to fp32
    assert abs(seen["clipped"] - 1) < 2e-7


@pytest.mark.parametrize("layers", [1, 6])
def test_a_step_asks_the_device_twice_whatever_the_number_of_parameters(tmp_path: Path, layers: int) -> None:
    """Once for loss and metrics, once for the norm; not once for each parameter."""
    waits = Waits()

    def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        def check(outputs: Any, again: Any) -> Any:
            waits.start()
            return outputs

        def refuse(grad_norm: float) -> bool:
            waits.stop()
            return False

        kwargs["refuse"] = refuse
        return train_step(engine, *args, **kwargs, check=check)

    train_with(tmp_path, step, layers=layers)
    assert waits.count == 2


def test_waits_are_counted() -> None:
    waits, x = Waits(), torch.ones(3)
    waits.start()
    float(x[0]), bool(x.sum() > 1), x[0].item(), x.tolist(), x.cpu(), torch.tensor([x[0], x[1]])
    waits.stop()
    assert waits.count == 7


@pytest.mark.parametrize("size", [1, 7, 2**18 - 1, 2**18 + 1, 3 * 2**18 + 5])
def test_squares_of_any_size_and_magnitude(size: int) -> None:
    """Against 80-bit arithmetic; magnitudes whose squares fp32 cannot hold."""
    generator = torch.Generator().manual_seed(fresh_seed())
    scratch = torch.empty(grad_norms.CHUNK["cpu"], dtype=torch.float64)
    for magnitude in (1e-30, 1.0, 1e30):
        total = torch.full((), 2 * magnitude**2, dtype=torch.float64)
        x = torch.randn(size, generator=generator) * magnitude
        grad_norms.add_squares(x, total, scratch, 0.25)
        wide = x.numpy().astype(np.longdouble)
        exact = 2 * np.longdouble(magnitude) ** 2 + np.square(wide).sum() / 4
        assert abs(total.item() / exact - 1) < 1e-12


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    scratch = torch.empty(grad_norms.CHUNK["cpu"], dtype=torch.float64)
    x = torch.randn(2**18 + 100, generator=generator)
    x[int(torch.randint(x.numel(), (), generator=generator))] = value
    total = torch.zeros((), dtype=torch.float64)
    grad_norms.add_squares(x, total, scratch)
    assert not math.isfinite(total.item())
    assert not math.isfinite(grad_norms.total_norm({"embedding": 1.0, "layers.0": math.sqrt(total.item())}))
