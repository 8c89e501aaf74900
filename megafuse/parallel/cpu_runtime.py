"""All that it takes to run megatron-core without CUDA: the one place that patches anything.

megatron-core names CUDA devices in a few hard-wired calls. `cpu_runtime()` replaces exactly those entry points of torch
by CPU equivalents for the length of a `with` block and puts every one of them back. On a CUDA machine it does nothing.
A TorchFunctionMode would be cleaner and doubles the cost of every operator; hence plain replacement.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

_ABSENT = object()


class _NoStream:
    """Stands for a CUDA stream: every method is a no-op, and it is its own context manager and event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any, **kwargs: Any) -> "_NoStream":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _CpuGenerators:
    """`torch.cuda.default_generators` whose every index is the CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with device="cuda" and pinned memory quietly turned into plain host memory."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


def _listed_splits(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """`all_to_all_single` that takes its split sizes as host tensors too; mcore makes arrays of CUDA tensors only."""

    @functools.wraps(exchange)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return exchange(*args, **kwargs)

    return call


def _no_properties(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("Torch not compiled with CUDA enabled")  # torch.compile probes for exactly this


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) for every entry point that megatron-core 0.16 to 0.19 touches."""
    cpu = torch.device("cpu")
    stream = _NoStream()
    tensor_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # mcore's optimizers compare with 'torch.cuda.FloatTensor' to tell parameter dtypes apart
        name = tensor_type(self, *args, **kwargs)
        return name if args or kwargs else name.replace("torch.", "torch.cuda.", 1)

    def current_device() -> torch.device:
        return cpu

    def lazy_init() -> None:
        return None

    return [
        (torch.cuda, "current_device", current_device),
        (torch.cuda.random, "current_device", current_device),  # imported there by name
        (torch.cuda, "_lazy_init", lazy_init),
        (torch.cuda.random, "_lazy_init", lazy_init),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        (torch.cuda, "current_stream", lambda *args, **kwargs: stream),
        (torch.cuda, "Stream", _NoStream),  # mcore's all-to-all of tokens copies its counts on a stream of its own
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "default_generators", _CpuGenerators()),
        (torch.cuda, "get_device_properties", _no_properties),
        (torch.distributed, "all_to_all_single", _listed_splits(torch.distributed.all_to_all_single)),
        (torch, "tensor", _on_cpu(torch.tensor)),
        (torch, "zeros", _on_cpu(torch.zeros)),
        (torch, "empty", _on_cpu(torch.empty)),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.Tensor, "type", type_name),
    ]


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Run megatron-core on the CPU inside this block; a no-op where CUDA is available. Not for several threads."""
    if torch.cuda.is_available() or isinstance(torch.cuda.default_generators, _CpuGenerators):
        yield
        return
    saved = []
    for owner, name, replacement in _replacements():
        saved.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in reversed(saved):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@contextlib.contextmanager
def compile_when_called() -> Iterator[None]:
    """Inside, `torch.compile` decorates only, and compiles at the first call; as ever where CUDA is available.

    megatron-core compiles its fused functions as it is imported. That loads TorchInductor, a third of a rank's start,
    for functions that are never called without CUDA.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.compile
    torch.compile = functools.partial(_compile_when_called, original)
    try:
        yield
    finally:
        torch.compile = original


def _compile_when_called(compile_: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    if not isinstance(model, FunctionType):
        return compile_(model, **options)

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(compile_(model, **options))
        return compiled[0](*args, **kwargs)

    compiled: list[Callable[..., Any]] = []
    return call
