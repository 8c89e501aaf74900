"""The 2-norm of the gradient, whole and by part of the model: what updates are clipped by, reported and guarded with.

Squares are added in float64: a float32 sum of 28 million of them was off by 1.6e-3 on a CPU. And the device is asked
once for all of them, not once for each parameter as megatron-core's own norm does without Transformer Engine.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import get_model_config
from torch import Tensor

from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine

# Elements that are float64 at a time. 2 MiB stay in a core's cache (9 times faster than a copy of the whole parameter),
# 32 MiB in a GPU's, with few launches.
CHUNK = {"cpu": 2**18, "cuda": 2**22}


def grad_norms(engine: Engine, topology: Topology) -> dict[str, float]:
    """{`embedding`, `layers.0` ..., `final_layernorm`, `output_layer`: 2-norm} of the reduced, unclipped gradients.

    Elements are counted once, whoever has copies of them, so `total_norm` of this is that of the whole gradient. To be
    called between a backward and the next forward. Collective: one all-reduce; every rank gets the same numbers.
    """
    parts = ["embedding", *(f"layers.{i}" for i in range(get_model_config(engine.model[0]).num_layers))]
    parts += ["final_layernorm", "output_layer"]
    place = {part: i for i, part in enumerate(parts)}
    table = torch.zeros(len(parts), 2, dtype=torch.float64, device=topology.device)  # squares; > 0 where there are any
    scratch = torch.empty(CHUNK[topology.device.type], dtype=torch.float64, device=topology.device)
    for chunk in engine.model:
        names = _parts(chunk.module)
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for param, gradient, share in _owned(buffer, sharded=chunk.ddp_config.use_distributed_optimizer):
                if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, topology.tp_group):
                    row = table[place[names[param]]]
                    add_squares(gradient, row[0], scratch, share)
                    row[1].fill_(1)
    total = topology.sum_over_world(table).tolist()
    return {part: math.sqrt(square) for part, (square, present) in zip(parts, total) if present}


def total_norm(norms: dict[str, float]) -> float:
    """The norm of the whole gradient; NaN where it is that of a part."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


def add_squares(gradient: Tensor, total: Tensor, scratch: Tensor, share: float = 1.0) -> None:
    """total += share * sum of squares of `gradient` [n], in float64, `scratch.numel()` elements at a time.

    total: [] float64; all on one device, which is not waited for. What the float32 elements hold is squared without
    rounding, so only the float64 additions round: 1e-13 for 28 million normal numbers.
    """
    for piece in gradient.split(scratch.numel()):
        exact = scratch[: piece.numel()].copy_(piece)
        total.add_(torch.dot(exact, exact), alpha=share)


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


def _owned(buffer: Any, *, sharded: bool) -> Iterator[tuple[Any, Tensor, float]]:
    """(parameter, elements of its gradient that this rank answers for, its share of the answer).

    With the distributed optimizer only the own shard of a bucket has been summed over the ranks. Without it every rank
    has all of them and answers for its share of each, so that a number which is not finite on one rank only is seen.
    """
    rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
    for param, (start, end, number) in buffer.param_index_map.items():
        bucket = buffer.buckets[number]
        if not sharded:
            yield param, bucket.grad_data[start - bucket.offset : end - bucket.offset], 1 / size
            continue
        part = bucket.grad_data.numel() // size
        first, last = bucket.offset + rank * part, bucket.offset + (rank + 1) * part
        if max(start, first) < min(end, last):
            yield param, bucket.grad_data[max(start, first) - bucket.offset : min(end, last) - bucket.offset], 1.0
