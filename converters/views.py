"""Rows of named tensors, read lazily: what safetensors folders and checkpoints have in common.

All reading is `pread` into a caller's buffer. Memory mapping would be shorter, but mapped pages count as the process's
memory, and the promise is that memory does not grow with the model.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Protocol

import torch

from megafuse.errors import IntegrityError, UnsupportedModelError

# safetensors' names of what weights may be stored in. Quantised types are refused: they need arithmetic.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # as config.json spells them
DEFAULT_BLOCK = 64 << 20
_CAST_BYTES = 1 << 20  # converted at a time, beside the block that is filled


class TensorView(Protocol):
    """Named tensors whose rows can be read. dtypes are safetensors' names; a vector is a matrix of one column."""

    def names(self) -> Sequence[str]:
        """Every tensor, in a fixed order."""

    def dtype(self, name: str) -> str:
        """`BF16`, `F16` or `F32`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` (bytes, exactly the size) with rows start..stop. Raises IntegrityError where bytes are missing."""


def itemsize(dtype: str) -> int:
    """Bytes of an element. Raises UnsupportedModelError for a type that is not a plain weight."""
    if dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(f"tensor dtype {dtype} is not supported; known: {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[dtype].itemsize


def row_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of one row of a tensor."""
    return itemsize(dtype) * prod(shape[1:])


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a whole tensor."""
    return itemsize(dtype) * prod(shape)


def blocks(rows: int, bytes_per_row: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `block_bytes` (but at least a row) that cover 0..rows in order."""
    step = max(1, block_bytes // bytes_per_row)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def stream(view: TensorView, name: str, buffer: bytearray) -> Iterator[memoryview]:
    """The bytes of a tensor in order, block by block, each in (a part of) `buffer`: use it before the next."""
    width = row_bytes(view.dtype(name), view.shape(name))
    if len(buffer) < width:
        buffer.extend(bytes(width - len(buffer)))
    for start, stop in blocks(view.shape(name)[0], width, len(buffer)):
        with memoryview(buffer) as whole, whole[: (stop - start) * width] as block:
            view.read(name, start, stop, block)
            yield block


def pread_into(fd: int, offset: int, out: memoryview, what: str) -> None:
    """Fill `out` from `offset` of a file. Raises IntegrityError, naming `what`, where the file ends too early."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], offset + done)
        if count <= 0:
            raise IntegrityError(
                f"{what}: the file ends {len(out) - done} bytes too early; it is truncated, fetch it again"
            )
        done += count


def pwrite_all(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at `offset` of a file. Raises OSError, as the system says why it cannot."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class HashedReads:
    """A `TensorView` that shows every block it reads to `seen`: pass one over it, tensor by tensor, in row order."""

    def __init__(self, view: TensorView, seen: Callable[[str, memoryview], None]) -> None:
        self._view, self._seen = view, seen

    def names(self) -> Sequence[str]:
        """As below it."""
        return self._view.names()

    def dtype(self, name: str) -> str:
        """As below it."""
        return self._view.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As below it."""
        return self._view.shape(name)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Read, then show."""
        self._view.read(name, start, stop, out)
        self._seen(name, out)


class CastView:
    """A `TensorView` in another dtype (`BF16` or `F32`): the one place where numbers, not bytes, are converted.

    Widening is exact; narrowing rounds to nearest, ties to even (torch's conversion).
    """

    def __init__(self, view: TensorView, dtype: str) -> None:
        self._view, self._dtype = view, dtype

    def names(self) -> Sequence[str]:
        """As below it."""
        return self._view.names()

    def dtype(self, name: str) -> str:
        """The target dtype."""
        return self._dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """As below it."""
        return self._view.shape(name)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Read and convert rows start..stop."""
        stored = self._view.dtype(name)
        if stored == self._dtype:
            self._view.read(name, start, stop, out)
            return
        width = row_bytes(stored, self._view.shape(name))
        target = torch.frombuffer(out, dtype=TORCH_DTYPES[self._dtype]).view(stop - start, -1)
        for low, high in blocks(stop - start, width, _CAST_BYTES):
            raw = bytearray((high - low) * width)
            self._view.read(name, start + low, start + high, memoryview(raw))
            target[low:high].copy_(torch.frombuffer(raw, dtype=TORCH_DTYPES[stored]).view(high - low, -1))
