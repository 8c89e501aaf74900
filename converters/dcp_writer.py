"""Writing a `torch_dist` checkpoint in one process, through torch's public distributed-checkpoint API.

A save planner whose plan comes from the table and whose data is read when it is written: no model, no process group,
one block of memory a job. Any tensor, pipeline or expert layout of megatron-core can load what this writes.
"""

import contextlib
import hashlib
import io
import json
import mmap
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megafuse.converters.jobs import Meter, run_jobs
from megafuse.converters.plan import OnRows, Packed, Plan
from megafuse.converters.views import TORCH_DTYPES, TensorView, blocks, row_bytes, tensor_bytes
from megafuse.errors import MegafuseError

# What mcore asks for when it opens a checkpoint folder.
_MCORE_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# A checkpoint has about 64 files, so that jobs share the work evenly, of a size that file systems like.
_FILES, _SMALLEST_FILE, _LARGEST_FILE = 64, 256 << 20, 4 << 30
_COMMON = {"content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False}}


def plan_files(plan: Plan, source: TensorView) -> dict[str, list[Packed]]:
    """The tensors by the name of the file that they will be in, whole and in the order of the table.

    It follows from the model alone, not from the jobs that write it.
    """
    total = sum(tensor_bytes(source.dtype(p.pieces[0].hf), p.shape) for p in plan.tensors.values())
    wanted = min(max(total // _FILES, _SMALLEST_FILE), _LARGEST_FILE)
    files: list[list[Packed]] = [[]]
    filled = 0
    for packed in plan.tensors.values():
        size = tensor_bytes(source.dtype(packed.pieces[0].hf), packed.shape)
        if files[-1] and filled + size > wanted:
            files.append([])
            filled = 0
        files[-1].append(packed)
        filled += size
    return {f"__{i}_0.distcp": tensors for i, tensors in enumerate(files)}


def write_torch_dist(
    plan: Plan,
    source: TensorView,
    folder: Path,
    *,
    block_bytes: int,
    seen: OnRows | None = None,
    jobs: int = 1,
    meter: Meter | None = None,
) -> dict[str, str]:
    """Write every tensor of `plan`, read from `source`, into the new `folder`; returns the sha256 of its files.

    Layers and experts are stacked as mcore stacks them. seen: told of every (HF name, bytes) copied; each HF tensor's
    rows come in order, several tensors at a time where there are several jobs. The bytes depend on the weights only:
    equal weights give equal files. Memory: about one block a job.
    """
    meter = meter or Meter(0)
    writer = _HashingWriter(folder, jobs, meter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is meant
            planner = _LazyPlanner(plan, source, block_bytes, seen, meter)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        for wrapped, _ in error.failures.values():
            if isinstance(wrapped, MegafuseError | OSError | KeyboardInterrupt):
                raise wrapped from None
        raise
    torch.save(_COMMON, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_MCORE_METADATA))
    return writer.digests


class _LazyPlanner(SavePlanner):
    """Plans one write item a block of rows, and reads the block when it is asked for. `files`: the items by file."""

    def __init__(self, plan: Plan, source: TensorView, block_bytes: int, seen: OnRows | None, meter: Meter) -> None:
        self._plan, self._source, self._block_bytes, self._seen, self._meter = plan, source, block_bytes, seen, meter
        self._blocks: dict[MetadataIndex, tuple[Packed, int, int]] = {}
        self._memory = threading.local()
        self.files: list[list[WriteItem]] = []

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to prepare: the state dict is the table."""

    def create_local_plan(self) -> SavePlan:
        """All tensors by file and block, and the empty extra states in the first file."""
        files = plan_files(self._plan, self._source).values()
        self.files = [[item for packed in file for item in self._items(packed)] for file in files]
        self.files[0] += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._plan.extra_states()]
        return SavePlan([item for file in self.files for item in file])

    def _items(self, packed: Packed) -> Iterator[WriteItem]:
        dtype = self._source.dtype(packed.pieces[0].hf)
        width = row_bytes(dtype, packed.shape)
        lead, stack = packed.place, self._plan.stack(packed.row)
        rest = packed.shape[1:]
        for start, stop in blocks(packed.shape[0], width, self._block_bytes):
            offset = torch.Size((*lead, start, *(0 for _ in rest)))
            size = torch.Size((*(1 for _ in lead), stop - start, *rest))
            index = MetadataIndex(packed.key, offset)
            self._blocks[index] = packed, start, stop
            data = TensorWriteData(
                ChunkStorageMetadata(offset, size),
                TensorProperties(dtype=TORCH_DTYPES[dtype]),
                torch.Size((*stack, *packed.shape)),
            )
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """One process: the local plan is the global plan; `.metadata` is its table of contents."""
        entries: dict[str, Any] = {}
        for item in all_plans[0].items:
            if (data := item.tensor_data) is None:
                entries[item.index.fqn] = BytesStorageMetadata()
            else:
                entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                entry.chunks.append(data.chunk)
        return all_plans, Metadata(entries, planner_data={})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The block, freshly read, where this thread read the one before: that has been written, and is not needed."""
        if write_item.tensor_data is None:
            return _no_extra_state()
        packed, start, stop = self._blocks[write_item.index]
        size = write_item.tensor_data.chunk.sizes
        dtype = write_item.tensor_data.properties.dtype
        count = size.numel() * dtype.itemsize
        with memoryview(self._buffer(count)) as whole:
            packed.gather(self._source, start, whole[:count], count // (stop - start), self._seen)
            self._meter.add(count)
            return torch.frombuffer(whole[:count], dtype=dtype).reshape(size)

    def _buffer(self, count: int) -> mmap.mmap:
        """This thread's block of memory, of at least `count` bytes; used again, as every page costs time when new."""
        memory: mmap.mmap | None = getattr(self._memory, "block", None)
        if memory is None or len(memory) < count:
            memory = self._memory.block = mmap.mmap(-1, max(count, self._block_bytes))
        return memory


def _no_extra_state() -> io.BytesIO:
    """What stands for "no FP8 state": loads in Transformer Engine's modules and in mcore's own."""
    buffer = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], buffer)
    return buffer


class _HashingStream(io.RawIOBase):
    """A file that hashes what is written to it, once and in order."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self._file.write(data))

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())


class _HashingFiles(FileSystem):
    """The local file system, noting the sha256 of every file written."""

    def __init__(self, digests: dict[str, str]) -> None:
        super().__init__()
        self._digests = digests

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            stream = _HashingStream(file)
            yield cast(io.IOBase, stream)
            self._digests[Path(path).name] = stream.digest.hexdigest()


class _HashingWriter(FileSystemWriter):
    """torch's writer with hashes, and without what would make equal checkpoints differ (path, random id).

    Each job writes files of its own, as ranks would: torch's own threads would make the files depend on their number.
    `per_thread_copy_ahead=0` keeps the loader serial where CUDA is present: blocks are only valid one at a time.
    """

    def __init__(self, folder: Path, jobs: int, meter: Meter) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        written: dict[str, str] = {}
        self.fs = _HashingFiles(written)
        self._written, self._jobs, self._meter = written, jobs, meter

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Every file of the planner, `jobs` at a time."""
        assert isinstance(planner, _LazyPlanner)
        write = super().write_data

        def one(number: int, items: list[WriteItem]) -> list[WriteResult]:
            prefix = replace(plan.storage_data, prefix=f"__{number}_")
            return list(write(replace(plan, items=items, storage_data=prefix), planner).wait())

        tasks = [partial(one, number, items) for number, items in enumerate(planner.files)]
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for file in run_jobs(tasks, self._jobs, self._meter) for result in file])
        return done

    @property
    def digests(self) -> dict[str, str]:
        """sha256 by name of the data files. (`.metadata` is renamed after it is written.)"""
        return {name: digest for name, digest in self._written.items() if name.endswith(".distcp")}

    def storage_meta(self) -> StorageMeta:
        """Anonymous."""
        return StorageMeta()
