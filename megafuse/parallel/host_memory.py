"""Host memory that is free but still counted as the process's own."""

import ctypes
import functools
from collections.abc import Callable

import torch


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the C library has none (macOS, musl)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows wants a name
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


def give_back_freed_memory() -> bool:
    """Return the heap's free pages to the system; whether any were. Nothing where CUDA is: what is large lies there.

    glibc keeps what was freed below the top of its heap: after a backward pass all of its activations, after DDP has
    moved the parameters into its buffer the old ones. Touching them again costs a page fault each, about 0.1 s a GiB.
    """
    if torch.cuda.is_available():
        return False
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))
