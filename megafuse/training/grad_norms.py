"""Gradient norms by part of the model: where a norm that is not finite, or far too large, comes from."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine


def grad_norms(engine: Engine, topology: Topology) -> dict[str, float]:
    """{`embedding`, `layers.0` ..., `final_layernorm`, `output_layer`: 2-norm} of the reduced, unclipped gradients.

    Elements are counted once, whoever has copies of them, so the root of the squares' sum is the norm that gradients
    are clipped by. To be called between a backward and the next forward. Collective; every rank gets the same numbers.
    """
    squares: dict[str, float] = defaultdict(float)
    for chunk in engine.model:
        parts = _parts(chunk.module)
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for param, gradient in _owned(buffer, sharded=chunk.ddp_config.use_distributed_optimizer):
                if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, topology.tp_group):
                    squares[parts[param]] += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
    told = topology.gather_on_rank_zero(dict(squares))
    total: dict[str, float] = defaultdict(float)
    for part, square in (item for rank in told or [] for item in rank.items()):
        total[part] += square
    norms = {part: math.sqrt(total[part]) for part in sorted(total, key=_place)}
    found: dict[str, float] = topology.from_rank_zero(norms)
    return found


def worst_part(norms: dict[str, float]) -> str:
    """For a message: the parts whose norm is not finite, or else the largest one."""
    broken = [part for part, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        return f"not finite in {', '.join(broken[:3])}" + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    part = max(norms, key=lambda part: norms[part])
    return f"largest in {part}: {norms[part]:.4g}"


def _parts(chunk: Any) -> dict[Any, str]:
    """The part of the model that each parameter of a FusionGPT chunk belongs to; layers are counted over all stages."""
    parts = {}
    for name, param in chunk.named_parameters():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            parts[param] = f"layers.{chunk.decoder.layers[int(layer[1])].layer_number - 1}"
        else:
            parts[param] = name.removeprefix("decoder.").split(".")[0]
    return parts


def _owned(buffer: Any, *, sharded: bool) -> Iterator[tuple[Any, Tensor]]:
    """(parameter, the elements of its gradient that this rank and no other of its copies' ranks answers for).

    With the distributed optimizer only the own shard of a bucket has been summed over the ranks.
    """
    rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
    for param, (start, end, number) in buffer.param_index_map.items():
        bucket = buffer.buckets[number]
        if not sharded:
            if rank == 0:
                yield param, bucket.grad_data[start - bucket.offset : end - bucket.offset]
            continue
        share = bucket.grad_data.numel() // size
        first, last = bucket.offset + rank * share, bucket.offset + (rank + 1) * share
        if max(start, first) < min(end, last):
            yield param, bucket.grad_data[max(start, first) - bucket.offset : min(end, last) - bucket.offset]


def _place(part: str) -> tuple[int, int]:
    """Sort key: embedding, layers in their order, the rest."""
    number = part.removeprefix("layers.")
    return (1, int(number)) if number.isdigit() else (0 if part == "embedding" else 2, 0)
