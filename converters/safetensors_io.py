"""Safetensors folders, read lazily and distrustfully.

A shard index or a header comes from the internet: names that leave the folder, holes, overlaps, and sizes that do not
add up are refused before any byte is copied.
"""

import contextlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megafuse.converters.formats import INDEX, describes_other_weights, is_model, refuse_without_safetensors
from megafuse.converters.views import pread_into, row_bytes
from megafuse.errors import ConfigError, DataError, IntegrityError

SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # safetensors' own limit
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: `offset` and `size` in bytes, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of one file: `text` exactly as it is stored (padding included), `entries` in file order."""

    text: str
    metadata: Mapping[str, str] | None
    entries: tuple[Entry, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    def encoded(self) -> bytes:
        """Length and text, as the file begins."""
        raw = self.text.encode()
        return struct.pack("<Q", len(raw)) + raw


def parse_header(text: str, where: str) -> Header:
    """Read a header's JSON. Raises IntegrityError for anything that the format forbids."""
    try:
        fields = json.loads(text, object_pairs_hook=unique_keys)
        metadata = fields.pop("__metadata__", None)
        entries = [
            Entry(name, field["dtype"], tuple(field["shape"]), field["data_offsets"][0], field["data_offsets"][1])
            for name, field in fields.items()
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise IntegrityError(f"{where}: the safetensors header is damaged ({error!r})") from None
    at, ordered = 0, []
    for entry in sorted(entries, key=lambda e: (e.offset, e.size)):
        size = entry.size - entry.offset
        sound = entry.dtype in _BITS and all(type(n) is int and n >= 0 for n in entry.shape)
        if entry.offset != at or not sound or size * 8 != prod(entry.shape) * _BITS[entry.dtype]:
            raise IntegrityError(
                f"{where}: {entry.name} ({entry.dtype} {list(entry.shape)}) at bytes {entry.offset}..{entry.size} "
                f"leaves a hole, overlaps, or has the wrong size; fetch the file again"
            )
        ordered.append(Entry(entry.name, entry.dtype, entry.shape, at, size))
        at = entry.size
    return Header(text, metadata, tuple(ordered))


def make_header(entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> Header:
    """A new header for (name, dtype, shape) in file order, in safetensors' compact form padded to 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        size = shape[0] * row_bytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    text += " " * (-len(text.encode()) % 8)
    return parse_header(text, "new header")


def read_header(fd: int, where: str) -> Header:
    """Read and check the header of an open file, and that the file ends where the header says."""
    file_bytes = os.fstat(fd).st_size
    if file_bytes < 8:
        raise IntegrityError(f"{where}: {file_bytes} bytes are no safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if length > min(_MAX_HEADER, file_bytes - 8):
        raise IntegrityError(f"{where}: a header of {length} bytes in a file of {file_bytes}; fetch the file again")
    raw = bytearray(length)
    pread_into(fd, 8, memoryview(raw), where)
    try:
        header = parse_header(raw.decode(), where)
    except UnicodeDecodeError:
        raise IntegrityError(f"{where}: the safetensors header is not UTF-8; fetch the file again") from None
    if file_bytes != 8 + length + header.data_bytes:
        raise IntegrityError(
            f"{where} has {file_bytes} bytes, its header describes {8 + length + header.data_bytes}; fetch it again"
        )
    return header


def plain_name(name: Any, where: str) -> str:
    """A file name that stays inside its folder. Raises DataError for anything else."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or Path(name).name != name or "\\" in name:
        raise DataError(
            f"{where}: {name!r} is not a plain file name, and would leave the folder; do not trust this model"
        )
    return name


def weight_files(folder: Path) -> list[str]:
    """File names that hold the weights: those of the shard index, else `model.safetensors`, else the only one there is.

    Raises ConfigError where there is none (saying how to make them, if the folder has others) or an unclear choice,
    DataError for an index that leaves the folder.
    """
    index = folder / INDEX
    if index.is_file():
        named = sorted(set(read_index(index).values()))
        if (folder / SINGLE).is_file() and SINGLE not in named:
            raise ConfigError(
                f"{folder} has {SINGLE} and an {INDEX} that does not name it: transformers would load the first, the "
                "index says others; delete the one that is not meant"
            )
        return named
    found = sorted(p.name for p in folder.glob("*.safetensors") if is_model(p.name))
    if SINGLE in found:
        return [SINGLE]
    if not found:
        refuse_without_safetensors(folder)
    if len(found) > 1:
        raise ConfigError(
            f"{folder} has no {INDEX}, no {SINGLE}, and {len(found)} other *.safetensors files; fix: fetch the index"
        )
    return found


def has_weights(folder: Path) -> bool:
    """There is a shard index or a safetensors file of a model: `weight_files` has something to say."""
    return (folder / INDEX).is_file() or any(is_model(p.name) for p in folder.glob("*.safetensors"))


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name of a shard index, file names checked by `plain_name`."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
        return {str(tensor): plain_name(file, str(path)) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not a shard index ({error!r}); fetch it again") from None


class SafetensorsFolder:
    """A `TensorView` of a Hugging Face folder. A context manager: it keeps one file descriptor a shard open.

    Raises IntegrityError for truncated or contradictory files, ConfigError where there are none, DataError for names
    that leave the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.headers: dict[str, Header] = {}
        self._place: dict[str, tuple[int, int, Entry]] = {}
        self._files: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            for file in weight_files(self.folder):
                self._open(file, stack)
            index = self.folder / INDEX
            if index.is_file() and (wrong := read_index(index).items() ^ self._files.items()):
                name, file = sorted(wrong)[0]
                raise IntegrityError(f"{index} and the shards disagree on {len(wrong)} entries, first {name} in {file}")
            self._stack = stack.pop_all()

    def _open(self, file: str, stack: contextlib.ExitStack) -> None:
        path = self.folder / file
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise IntegrityError(f"{path} is missing, but the shard index names it; fetch it") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        stack.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"{path} is no file; fix: give a folder with the weights themselves")
        header = self.headers[file] = read_header(fd, str(path))
        data = len(header.encoded())
        for entry in header.entries:
            if entry.name in self._place:
                raise IntegrityError(f"{path}: tensor {entry.name} is in {self._files[entry.name]} too")
            self._place[entry.name] = fd, data + entry.offset, entry
            self._files[entry.name] = file

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def names(self) -> Sequence[str]:
        """Every tensor, in file order."""
        return list(self._place)

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype."""
        return self._place[name][2].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self._place[name][2].shape

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with rows start..stop."""
        fd, offset, entry = self._place[name]
        width = entry.size // entry.shape[0]
        if len(out) != (stop - start) * width or not 0 <= start <= stop <= entry.shape[0]:
            raise IntegrityError(f"{name}: rows {start}..{stop} do not fit {len(out)} bytes of shape {entry.shape}")
        pread_into(fd, offset + start * width, out, f"{self.folder / self._files[name]} ({name})")

    def read_all(self, name: str) -> bytes:
        """The bytes of a (small) tensor."""
        fd, offset, entry = self._place[name]
        raw = bytearray(entry.size)
        pread_into(fd, offset, memoryview(raw), name)
        return bytes(raw)


def side_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(path, kept) of everything in `folder` that is no weight of the model.

    Kept: configuration, tokenizer, templates, code, the shard index. Not kept: folders, weights in other formats, and
    what would have them (an adapter, a quantisation) loaded with the model's.
    Raises ConfigError for a link that leads nowhere: what it should hold would be missing in silence.
    """
    weights = set(weight_files(folder)) if has_weights(folder) else set()
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}, which is not there; fetch it, or remove the link"
            )
        if path.name not in weights:
            yield path, path.is_file() and not describes_other_weights(path.name)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: it would silently keep the last of equal keys. Raises ValueError."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is repeated")
    return made
