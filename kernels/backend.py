"""Which implementation of the kernels runs: `torch` anywhere, `triton` on CUDA devices from sm_80 on."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
from typing import Any, Literal

import torch

from megafuse.errors import ConfigError

BACKENDS = ("auto", "torch", "triton")
TRITON_DTYPES = (torch.bfloat16, torch.float32)
OLDEST_TRITON = (3, 4)  # host-side tensor descriptors; comes with torch 2.8
_LOG = logging.getLogger("megafuse.kernels")


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """The implementation for tensors of `dtype` on `device`.

    `auto` takes Triton where it can run and `torch` elsewhere; its first choice on each kind of device is logged.
    On a CPU, Triton runs only in its interpreter, which is slow and for tests: `TRITON_INTERPRET=1` in the environment
    before Triton is imported, and `backend="triton"`.

    Raises ConfigError on an unknown name, and on `triton` where it cannot run, saying why.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is not known: use one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch"
    obstacle = _obstacle(device) or _wrong_dtype(dtype)
    if backend == "triton":
        if obstacle:
            raise ConfigError(f"backend='triton' cannot run here: {obstacle}; use backend='torch' or 'auto'")
        return "triton"
    if device.type == "cpu":
        obstacle = obstacle or "the tensors are on a CPU"
    chosen: Literal["torch", "triton"] = "torch" if obstacle else "triton"
    _say(chosen, str(device), obstacle)
    return chosen


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter. Triton asks once, where a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(tensor: torch.Tensor) -> Any:
    """Context in which Triton launches on the tensor's device: it launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _wrong_dtype(dtype: torch.dtype) -> str:
    return "" if dtype in TRITON_DTYPES else f"{dtype} is not one of {', '.join(str(d) for d in TRITON_DTYPES)}"


@functools.cache
def _obstacle(device: torch.device) -> str:
    """Why Triton kernels cannot run on the device; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    found = importlib.metadata.version("triton")
    if tuple(int(n) for n in found.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {found} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cpu":
        return "" if interpreted() else "the tensors are on a CPU (TRITON_INTERPRET=1 runs the interpreter)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} devices were never tried"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"sm_{major}{minor} is older than sm_80"


@functools.cache
def _say(chosen: str, device: str, obstacle: str) -> None:
    _LOG.info("kernels on %s: %s%s", device, chosen, f" ({obstacle})" if obstacle else "")
