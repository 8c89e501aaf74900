"""A rank's files of a checkpoint: planned by megatron-core, written here or by a process of their own.

Background writing forks: the child has the tensors as they are at this moment (those of a GPU are copied to the host
first), so training may change its own at once. Forking a process with threads is safe for a child that only writes
files: it touches neither CUDA nor a process group, and ends by `_exit`. It dies with its parent, so that no orphan
writes into the folder of a run that was started again.

Both ways run the same function over the same plan, so both write the same bytes.
"""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megafuse.observe.manifest import file_sha256
from megafuse.parallel.topology import Topology

_FORMAT = ("torch_dist", 1)


@dataclass(frozen=True)
class Written:
    """What one rank wrote, or why it could not."""

    results: list[Any]  # torch's WriteResult of every tensor and object
    hashes: dict[str, str]  # SHA-256 by file name; the files are on disk
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """The files of this rank; on rank 0 also the metadata of all."""

    writer: Any  # mcore's FileSystemWriterAsync
    metadata: Any
    folder: Path

    def staged(self) -> list[Any]:
        """The buckets, one a file, with their tensors in host memory."""
        buckets = self.writer.write_buckets
        return list(self.writer.preload_tensors(buckets, True)) if buckets else []


class _Strategy(TorchDistSaveShardedStrategy):
    """mcore's planning alone. Its own execution waits for ever for a writer that died, and fails on one rank only."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return Plan(writer, save_state_dict_ret[1], Path(writer.checkpoint_dir))


def plan_save(state: dict[str, Any], folder: Path, topology: Topology) -> Plan:
    """Lay out `state` (see `state.run_state`) over files of the empty `folder`; writes common.pt. Collective.

    Raises:
        OSError: on every rank, where rank 0 could not write.
    """
    if filesystem_async._results_queue is None:  # else mcore starts a process that holds a queue nobody reads
        filesystem_async._results_queue = queue.SimpleQueue()
    sharded, common = save_preprocess(state, True, None)
    topology.on_rank_zero(lambda: TorchCommonSaveStrategy(*("torch", 1)).save_common(common, folder))
    plan = _Strategy(*_FORMAT).async_save(sharded, folder)
    assert isinstance(plan, Plan)
    return plan


def finish_save(plan: Plan, results: Sequence[list[Any]]) -> None:
    """Write what names the format and where every tensor is. One process only, after all ranks have written."""
    plan.writer.finish(plan.metadata, results)
    save_config(CheckpointingConfig(*_FORMAT), str(plan.folder))


def write_files(plan: Plan, buckets: Sequence[Any]) -> Written:
    """Write and hash this rank's files, and bring them to disk. Never raises for a failed write."""
    results, hashes = [], {}
    with ThreadPoolExecutor(max(len(buckets), 1)) as pool:
        write = functools.partial(_write_file, [plan.writer.transforms])
        for bucket, found in zip(buckets, pool.map(write, range(len(buckets)), buckets)):
            if isinstance(found, Exception):
                return Written([], {}, f"{bucket[0]}: {found}")
            results += found[0]
            hashes[bucket[1]] = found[1]
    return Written(results, hashes)


def _write_file(transforms: list[Any], number: int, bucket: Any) -> tuple[list[Any], str] | Exception:
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(number)
    try:
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, results_queue=told, count_queue=unfinished, use_fsync=True
        )
        found = told.get()[1]
        return found if isinstance(found, Exception) else (found, file_sha256(bucket[0]))
    except Exception as error:
        return error


class Background:
    """`write_files` in a process of its own. Nothing here is collective."""

    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, end = context.Pipe(duplex=False)
        self._written: Written | None = None
        self._process = context.Process(
            target=_write_and_tell, args=(plan, plan.staged(), end, os.getpid()), name="checkpoint writer", daemon=True
        )
        self._process.start()
        end.close()

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._written is not None or self._pipe.poll() or not self._process.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it is known by now that there will be no checkpoint."""
        return self.done and bool(self.wait().error)

    def wait(self) -> Written:
        """What the process wrote; an `error` where it failed or died."""
        if self._written is None:
            wait([self._pipe, self._process.sentinel])
            try:
                found = self._pipe.recv() if self._pipe.poll() else None
            except EOFError:
                found = None
            self._process.join(5)
            self.abandon()
            died = Written([], {}, f"the writer died with exit code {self._process.exitcode}")
            self._written = found or died
        return self._written

    def abandon(self) -> None:
        """End the process, whatever it does."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _write_and_tell(plan: Plan, buckets: Sequence[Any], pipe: Connection, parent: int) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # meant for the run, which waits for this process
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    pipe.send(write_files(plan, buckets))
    pipe.close()
    os._exit(0)
