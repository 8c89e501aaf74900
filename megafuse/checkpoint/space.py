"""Is there room for a checkpoint? Asked before it is written, and before the first step of a run."""

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megafuse.errors import StorageError
from megafuse.parallel.topology import Topology

_SLACK = 64 << 20  # tokenizer, manifest, archive headers


def checkpoint_bytes(model_state: dict[str, Any], topology: Topology, *, optimizer: bool) -> int:
    """Bytes of a checkpoint of this model on disk, an upper estimate. Collective.

    Each tensor counts once, on the rank that stores it; with `optimizer` each element also has fp32 master weight and
    two moments.
    """
    total = 0
    for entry in nested_values(extract_sharded_base(model_state)[0]):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_main_replica(entry.replica_id):
            total += entry.data.numel() * (entry.data.element_size() + (12 if optimizer else 0))
    return int(topology.sum_over_world(torch.tensor([total], dtype=torch.float64)).item()) + _SLACK


def refuse_full_disk(root: Path, needed: int) -> None:
    """Raise where the file system of `root` has less than `needed` bytes free. One process only.

    Raises:
        StorageError: bytes needed, bytes free, and what to do.
    """
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StorageError(
            f"{root}: a checkpoint needs {needed:,} bytes, the file system has {free:,}; free {needed - free:,} bytes, "
            "lower checkpoint.keep, or set checkpoint.final_optimizer = false for the last one"
        )
