"""Model weights of a `torch_dist` checkpoint, read lazily: any layout, megatron-core's own or ours, no process group.

`.metadata` is a pickle, so it is read by an unpickler that knows the few classes of the format and nothing else. The
`.distcp` files are concatenated `torch.save` archives whose payloads are stored uncompressed: rows are read in place.
"""

import contextlib
import io
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.converters.plan import Packed, Piece, Plan
from megafuse.converters.safetensors_io import plain_name
from megafuse.converters.views import TORCH_DTYPES, itemsize, pread_into
from megafuse.errors import ConfigError, IntegrityError, UnsupportedModelError

# What `.metadata` may name: plain records. mcore keeps its save plan in it; its own two classes are older.
_METADATA_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
_INERT = {"megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"}}
_SKIPPED = ("optimizer.", "optimizer_", "rng_state", "scheduler.")
# Where mcore keeps fp32 master weights: the distributed optimizer, then the plain mixed-precision one.
_MASTER = ("optimizer.state.param.", "optimizer.state.fp32_param.")
# After these comes the number of the layer or expert, unless the tensor holds all of them (mcore's default).
_STACKS = ("decoder.layers.", ".mlp.experts.experts.")
_NAMES = {str(dtype): name for name, dtype in TORCH_DTYPES.items()}


class _Inert:
    """Takes the place of a class whose contents do not matter."""


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of `.metadata`; anything else is an IntegrityError, raised before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        if name in _INERT.get(module, ()):
            return _Inert
        raise IntegrityError(f".metadata names {module}.{name}, which no checkpoint needs; do not trust this file")


def read_metadata(folder: Path) -> Any:
    """`.metadata` of a checkpoint, through an unpickler that knows the classes of the format and nothing else.

    Raises ConfigError where there is none, IntegrityError where it is damaged or names anything else.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise ConfigError(f"{folder} is no torch_dist checkpoint: it has no .metadata")
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        _ = metadata.storage_data.items(), metadata.state_dict_metadata.items()
    except IntegrityError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise IntegrityError(f"{path} is damaged ({error!r}); restore the checkpoint") from None
    return metadata


class _TensorUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a saved tensor as (storage offset, size, stride) and builds nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        raise IntegrityError(f"a saved tensor names {module}.{name}; it is no plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


@dataclass(frozen=True)
class _Chunk:
    """A box of one layer's (and expert's) tensor, in elements; the first `skip` elements of its payload are others'."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    skip: int
    info: Any


@dataclass
class _Tensor:
    shape: tuple[int, ...]
    dtype: str
    chunks: list[_Chunk] = field(default_factory=list)


class DcpFolder:
    """A `TensorView`, by mcore name, of the model weights in a checkpoint. A context manager: it keeps files open.

    Stacked keys (`decoder.layers.mlp...`, [layers, ...]) are seen layer by layer under `decoder.layers.7.mlp...`, and
    stacked experts (`mlp.experts.experts.linear_fc2...`) under `mlp.experts.experts.5.linear_fc2...`.
    `stacked` and `has_optimizer` say what was found. Optimizer state is left out; with `master` its fp32 master weights
    are read INSTEAD of the model's.
    Threads may read side by side.
    Raises ConfigError where there is no checkpoint (or no master weights in it), IntegrityError where it is damaged.
    """

    def __init__(self, folder: str | Path, *, master: bool = False) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, _Tensor] = {}
        self._fds: dict[str, int] = {}
        self._payloads: dict[tuple[str, int], int] = {}
        self._stack, self._opening = contextlib.ExitStack(), threading.Lock()
        self.stacked = False
        self.has_optimizer = False
        metadata = read_metadata(self.folder)
        infos = {(i.fqn, tuple(i.offset)): s for i, s in metadata.storage_data.items() if i.offset is not None}
        for key, entry in metadata.state_dict_metadata.items():
            self.has_optimizer |= key.startswith("optimizer.")
            if not hasattr(entry, "chunks"):
                continue
            prefix = next((p for p in _MASTER if master and key.startswith(p)), None)
            if prefix or not (master or key.startswith(_SKIPPED)):
                self._add(key, (prefix or ""), entry, infos)
        if master and not self._tensors:
            raise ConfigError(f"{self.folder} holds no fp32 master weights; use source 'model'")
        self._join_halves()

    def _add(self, key: str, prefix: str, entry: Any, infos: dict[tuple[str, tuple[int, ...]], Any]) -> None:
        base = key.removeprefix(prefix)
        stacks = [stack for stack in _STACKS if stack in base and not base.split(stack)[1].split(".")[0].isdigit()]
        self.stacked |= _STACKS[0] in stacks
        lead = len(stacks)
        dtype = _NAMES.get(str(entry.properties.dtype), str(entry.properties.dtype))
        for chunk in entry.chunks:
            offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
            info = infos.get((key, offset))
            if info is None:
                raise IntegrityError(f"{self.folder}: .metadata does not say where {key} at {offset} is stored")
            for order, place in enumerate(product(*map(range, size[:lead]))):
                name = base
                for stack, first, within in zip(stacks, offset, place):
                    name = name.replace(stack, f"{stack}{first + within}.", 1)
                tensor = self._tensors.setdefault(name, _Tensor(tuple(entry.size)[lead:], dtype))
                tensor.chunks.append(_Chunk(offset[lead:], size[lead:], order * prod(size[lead:]), info))

    def _join_halves(self) -> None:
        """mcore's `singleton_local_shards` stores [gate] and [up] apart, as `weight_w` and `weight_v`."""
        for name in [n for n in self._tensors if n.endswith(".weight_w")]:
            first, second = self._tensors.pop(name), self._tensors.pop(name[:-1] + "v", None)
            if second is None or second.shape != first.shape or second.dtype != first.dtype:
                raise IntegrityError(f"{self.folder}: {name} has no equal {name[:-1]}v")
            rows = first.shape[0]
            moved = [_Chunk((c.offset[0] + rows, *c.offset[1:]), c.size, c.skip, c.info) for c in second.chunks]
            joined = _Tensor((2 * rows, *first.shape[1:]), first.dtype, first.chunks + moved)
            self._tensors[name.removesuffix("_w")] = joined

    def __enter__(self) -> "DcpFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def names(self) -> Sequence[str]:
        """Every model tensor, layer by layer."""
        return list(self._tensors)

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype."""
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored: vocabulary rows may be padded."""
        return self._tensors[name].shape

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with rows start..stop, collected from whatever boxes the saving layout cut."""
        tensor = self._tensors[name]
        size = itemsize(tensor.dtype)
        width = prod(tensor.shape[1:]) * size
        rows = np.frombuffer(out, np.uint8).reshape(stop - start, width)
        filled = 0
        for chunk in tensor.chunks:
            low, high = max(start, chunk.offset[0]), min(stop, chunk.offset[0] + chunk.size[0])
            if low >= high:
                continue
            fd, payload = self._payload(name, chunk, size)
            part = prod(chunk.size[1:]) * size
            at = payload + chunk.skip * size + (low - chunk.offset[0]) * part
            if part == width:
                pread_into(fd, at, out[(low - start) * width : (high - start) * width], name)
            else:  # row-parallel: a block of columns
                block = np.empty((high - low, part), np.uint8)
                pread_into(fd, at, block.data.cast("B"), name)
                column = chunk.offset[1] * size
                rows[low - start : high - start, column : column + part] = block
            filled += (high - low) * part
        if filled != rows.size:
            raise IntegrityError(
                f"{self.folder}: {name}: {filled} of {rows.size} bytes of rows {start}..{stop} are stored"
            )

    def _payload(self, name: str, chunk: _Chunk, size: int) -> tuple[int, int]:
        """(file descriptor, offset of the first element) of a saved tensor."""
        file = plain_name(chunk.info.relative_path, f"{self.folder}/.metadata")
        where = f"{self.folder / file} ({name})"
        with self._opening:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(self.folder / file, os.O_RDONLY)
                except FileNotFoundError:
                    raise IntegrityError(f"{where} is missing; restore the checkpoint") from None
                self._stack.callback(os.close, self._fds[file])
        fd, begin = self._fds[file], chunk.info.offset
        if (file, begin) not in self._payloads:
            if os.fstat(fd).st_size < begin + chunk.info.length:
                raise IntegrityError(f"{where} is truncated; restore the checkpoint")
            offset, stored = _locate(fd, begin, chunk.info.length, where, size)
            if chunk.skip + prod(chunk.size) > stored // size:
                raise IntegrityError(f"{where} holds {stored} bytes, too few for {list(chunk.size)}")
            self._payloads[file, begin] = offset
        return fd, self._payloads[file, begin]


def _locate(fd: int, begin: int, length: int, where: str, size: int) -> tuple[int, int]:
    """(offset of the first element, bytes from there) of the one contiguous tensor in a `torch.save` archive."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Slice(fd, begin, length), 1 << 12)) as archive:
            (data,) = [z for z in archive.infolist() if "/data/" in z.filename]
            (record,) = [z for z in archive.infolist() if z.filename.endswith("/data.pkl")]
            shift, shape, stride = _TensorUnpickler(io.BytesIO(archive.read(record))).load()
    except IntegrityError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise IntegrityError(f"{where} is damaged ({error!r}); restore the checkpoint") from None
    steps, expected = 1, []
    for extent in reversed(shape):
        expected.append(steps)
        steps *= extent
    plain = all(n == 1 or a == b for n, a, b in zip(shape, stride, reversed(expected)))
    if data.compress_type != zipfile.ZIP_STORED or not plain:
        raise UnsupportedModelError(f"{where}: the tensor is stored compressed or with strides {stride}")
    fixed = os.pread(fd, 4, begin + data.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", fixed)
    start = begin + data.header_offset + 30 + name_length + extra_length
    return start + shift * size, data.file_size - shift * size


class _Slice(io.RawIOBase):
    """Bytes begin .. begin + length of a file descriptor, as a file of its own."""

    def __init__(self, fd: int, begin: int, length: int) -> None:
        self._fd, self._begin, self._length, self._at = fd, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, out: Any) -> int:
        count = max(0, min(len(out), self._length - self._at))
        with memoryview(out) as whole:
            got = os.preadv(self._fd, [whole[:count]], self._begin + self._at) if count else 0
        self._at += got
        return got


class HfView:
    """The weights of a checkpoint under their HF names and in HF shapes: `Plan` read backwards, padding left out.

    Raises UnsupportedModelError for weights that the table does not know, IntegrityError for missing ones or another
    shape; vocabulary rows may be padded.
    """

    def __init__(self, plan: Plan, weights: DcpFolder) -> None:
        self.plan, self._weights = plan, weights
        there = set(weights.names())
        if unknown := sorted(there - set(plan.tensors)):
            raise UnsupportedModelError(
                f"{weights.folder}: {len(unknown)} weights are not in the table of {plan.table.name}, and would be "
                f"lost: {', '.join(unknown[:5])}"
            )
        if missing := sorted(set(plan.tensors) - there):
            raise IntegrityError(f"{weights.folder}: {len(missing)} weights are missing: {', '.join(missing[:5])}")
        for packed in plan.tensors.values():
            _check_shape(weights, packed)

    def names(self) -> Sequence[str]:
        """HF names, in table order."""
        return list(self.plan.hf_shapes)

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype."""
        return self._weights.dtype(self.plan.pieces[name][0].mcore)

    def shape(self, name: str) -> tuple[int, ...]:
        """HF shape."""
        return self.plan.hf_shapes[name]

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with rows start..stop of the HF tensor."""
        width = len(out) // (stop - start)
        for piece in self.plan.pieces[name]:
            low, high = max(start, piece.start), min(stop, piece.start + piece.rows)
            if low < high:
                self._read_piece(piece, low, high, out[(low - start) * width : (high - start) * width])

    def _read_piece(self, piece: Piece, low: int, high: int, out: memoryview) -> None:
        shift = piece.at - piece.start
        self._weights.read(piece.mcore, low + shift, high + shift, out)


def _check_shape(weights: DcpFolder, packed: Packed) -> None:
    stored, wanted = weights.shape(packed.name), packed.shape
    padded = packed.row.vocabulary and stored[1:] == wanted[1:] and stored[0] >= wanted[0]
    if stored != wanted and not padded:
        raise IntegrityError(
            f"{weights.folder}: {packed.name} has shape {list(stored)}, config.json implies {list(wanted)}"
        )
