"""Process groups of one run: who is where, and the few collectives that the rest of the package needs."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megafuse.config.train import ParallelConfig
from megafuse.launch.environment import world_from_environment
from megafuse.parallel.cpu_runtime import cpu_runtime

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. Groups are torch process groups; sizes multiply to the world size."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    tp_group: Any
    cp_group: Any
    dp_group: Any  # data x context parallel: the ranks that hold copies of the same parameters
    groups: Any  # mcore's ProcessGroupCollection
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """This rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the LM head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_reporter(self) -> bool:
        """One rank a data-parallel replica: it holds the log-prob sums, of which its tensor- and context-parallel
        peers hold copies."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum) over every rank, in place on this rank's device. Ranks with nothing to add pass zeros."""
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def least(self, *values: float) -> list[float]:
        """The least of each value over all ranks: one all-reduce (MIN)."""
        flags = torch.tensor(values, dtype=torch.float32).to(self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        return list(flags.tolist())

    def all_agree(self, ok: bool) -> bool:
        """True when `ok` is true on every rank: one all-reduce (MIN)."""
        return self.least(float(ok))[0] > 0

    def from_rank_zero(self, value: Any) -> Any:
        """The picklable `value` of rank 0, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_on_rank_zero(self, value: T) -> list[T] | None:
        """The picklable values of all ranks, in their order, on rank 0; None elsewhere."""
        box: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0)
        return box

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """What `function()` returns on rank 0, on every rank; what it raises there is raised everywhere: none hangs."""
        value: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = function()
            except Exception as caught:
                error = caught
        value, error = self.from_rank_zero((value, error))
        if error is not None:
            raise error
        return value

    def from_last_stage(self, value: Any) -> Any:
        """The picklable `value` of the highest rank, which always holds the LM head, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=self.world_size - 1, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def has_gloo_groups() -> bool:
    """Whether the layout gave its data-parallel groups gloo twins. On CUDA it does not. Call it inside `layout`."""
    from megatron.core import parallel_state

    try:
        twin = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True, partial_data_parallel=True)
    except AssertionError:  # how mcore says that there is none
        return False
    return twin is not None


def world_size_here() -> int:
    """Processes of this job, known before any process group starts."""
    if dist.is_initialized():
        return dist.get_world_size()
    environ = {**os.environ, **world_from_environment(dict(os.environ))}
    return int(environ["WORLD_SIZE"])


@contextlib.contextmanager
def process_groups(timeout_minutes: float = 30.0) -> Iterator[tuple[int, int]]:
    """Join the world (NCCL on CUDA, gloo elsewhere) and leave it at the end. Yields (rank, world size).

    A world that the caller has already joined is used as it is and left alone.
    """
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    environ = {**os.environ, **world_from_environment(dict(os.environ))}
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    if "MASTER_ADDR" in environ:
        method = f"tcp://{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}" if "RANK" not in os.environ else "env://"
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world, timeout=timeout)
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def layout(parallel: ParallelConfig, *, seed: int = 0) -> Iterator[Topology]:
    """Lay `parallel` over the joined world, inside the CPU runtime where there is no CUDA; undone at the end.

    Several layouts may follow each other in one world. Whether `parallel` fits is checked before: see
    `parallel.layouts`.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    rank, world = dist.get_rank(), dist.get_world_size()
    with cpu_runtime():
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=not torch.cuda.is_available(),
        )
        try:
            tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
            cuda = torch.cuda.is_available()
            yield Topology(
                rank=rank,
                world_size=world,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                tp_size=parallel.tensor,
                pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
                pp_size=parallel.pipeline,
                dp_rank=parallel_state.get_data_parallel_rank(),
                dp_size=parallel_state.get_data_parallel_world_size(),
                cp_rank=parallel_state.get_context_parallel_rank(),
                cp_size=parallel.context,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                cp_group=parallel_state.get_context_parallel_group(),
                dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                groups=ProcessGroupCollection.use_mpu_process_groups(),
                device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
            )
        finally:
            # mcore only forgets its groups; without this every layout would leave dozens of gloo threads behind, each
            # waking a hundred times a second until the cycles that hold its group are collected
            groups = getattr(parallel_state, "_global_process_group_list", None) or []
            parallel_state.destroy_model_parallel()
            for group in groups:
                if group is not None:
                    with contextlib.suppress(ValueError):  # some are gone with destroy_model_parallel
                        dist.destroy_process_group(group)
            del groups
            gc.collect()
