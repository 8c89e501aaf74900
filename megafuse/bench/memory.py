"""Peak memory of this process: the CUDA allocator's where there is a device, else the resident set."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

CUDA = "bytes that torch's CUDA allocator held, largest rank"
RESIDENT = "resident set of the process, largest rank"
LIFETIME = "resident set of the process since it began, largest rank"


def reset_peak(device: torch.device) -> str:
    """Start a new peak; returns what `peak_bytes` will then be. Only Linux can do so for a resident set."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return CUDA
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
        return RESIDENT
    return LIFETIME


def peak_bytes(device: torch.device) -> int:
    """The peak since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
