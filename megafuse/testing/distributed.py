"""Run collective functions in several real processes over gloo, on one machine, with a deadline."""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megafuse.parallel.topology import process_groups

# What nearly every rank imports, some seven seconds of a core: the server that ranks are forked from does it once.
PRELOADED = (
    "megafuse.training.run",
    "megafuse.model.spec",
    "megafuse.testing.gradients",
    "megafuse.converters.importer",
    "transformers.models.llama.modeling_llama",
    "datasets",
)


class WorkerFailed(AssertionError):
    """A worker process raised or died; the message holds its rank and traceback."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """`function(*args)` on `world_size` ranks of one gloo world; the results by rank.

    `function` must be importable by name in a fresh process (tests keep theirs in `megafuse.testing`), its results
    picklable. A calling program needs the `if __name__ == "__main__"` guard. One rank runs in the calling process.
    Several are forked from a server that has only imported (one for each calling program, which it ends with), with
    the caller's environment of now; all share one seed of hashes, which ranks under torchrun do not. With CUDA they are
    new processes.

    Raises:
        WorkerFailed: a rank raised (with its traceback), died, or missed the deadline; all processes are gone then.
    """
    if world_size == 1:
        with process_groups():
            return [function(*args)]
    context: Any = multiprocessing.get_context("spawn" if has_cuda() else "forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    environment = dict(os.environ)  # the server keeps the one in which it was started
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_worker, args=(send, rank, world_size, folder, timeout, environment, function, args))
            for rank, (_, send) in enumerate(pipes)
        ]
        try:
            for process, (_, send) in zip(processes, pipes):
                process.start()
                send.close()
            return _results([receive for receive, _ in pipes], timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def has_cuda() -> bool:
    """Whether models and ranks are for CUDA, whose context no process has that is forked after a look for a device."""
    import torch

    return torch.cuda.is_available()


def _results(pipes: Sequence[Connection], timeout: float) -> list[Any]:
    """What every rank returned. Of several failures the first to arrive is raised: the others follow from it."""
    deadline, waiting = time.monotonic() + timeout, dict(enumerate(pipes))
    results: list[Any] = [None] * len(pipes)
    while waiting:
        ready = wait(waiting.values(), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailed(f"ranks {sorted(waiting)} gave no result within {timeout:.0f} s")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                failed, results[rank] = waiting.pop(rank).recv()
            except EOFError:
                raise WorkerFailed(f"rank {rank} died without a result") from None
            if failed:
                raise WorkerFailed(f"rank {rank} raised:\n{results[rank]}")
    return results


def _worker(
    pipe: Connection,
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: Any,
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    torch.set_num_threads(1)
    gc.freeze()  # the server's modules: mcore asks for a collection at every save and change of layout
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        dist.barrier()  # a rank that is done at once must not close the connections that others are still making
        pipe.send((False, function(*args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        pipe.close()
        os._exit(1)  # peers wait in a collective: their pipes break, and this process must not wait for them
    dist.destroy_process_group()


def freeze_modules() -> None:
    """Keep a worker's modules out of garbage collection, which mcore asks for at every save and change of layout."""
    import torch.distributed as dist

    import megafuse.training.run  # noqa: F401

    if dist.get_world_size() > 1:  # a world of one lives in the caller's process, whose garbage is not ours to keep
        gc.freeze()


def run_trainings(configs: Sequence[Any]) -> None:
    """Train each TrainConfig in turn in the joined world: several layouts for one start of the processes."""
    from megafuse.training.run import train

    freeze_modules()
    for config in configs:
        train(config)
