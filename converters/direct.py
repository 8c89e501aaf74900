"""A Hugging Face folder straight into a model that stands at any layout: no checkpoint in between.

megatron-core's own sharded state dict says which part of which tensor a rank holds; the plan says where in which file
its rows lie. So every layout that mcore can cut a model into is served: uneven and virtual pipelines, experts, padding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megafuse.converters.folders import open_weights
from megafuse.converters.plan import Packed, Plan
from megafuse.converters.views import DEFAULT_BLOCK, TORCH_DTYPES, TensorView, blocks, row_bytes
from megafuse.errors import IntegrityError
from megafuse.parallel.topology import Topology


def load_hf_into(model: list[Any], topology: Topology, folder: str | Path, *, block_bytes: int = DEFAULT_BLOCK) -> None:
    """Fill the bare chunks `model` with the weights of the Hugging Face folder (or checkpoint) `folder`, cast to fit.

    A rank reads the rows that it holds; of a row-parallel matrix whole rows, of which it keeps its columns. Memory: a
    block. Not collective. Raises IntegrityError where the folder holds another model (see `check_fits`), or a parameter
    is not among the weights, or not all of it.
    """
    from megafuse.checkpoint.state import model_state

    parameters = {p.data_ptr(): p.numel() for chunk in model for p in chunk.parameters()}
    filled = 0
    with open_weights(folder) as (plan, view), torch.no_grad():
        tensors = local_tensors(model_state(model, topology))
        check_fits(plan, tensors, tp_size=topology.tp_size, where=str(folder))
        for tensor in tensors:
            fill(tensor.data, plan, view, tensor.key, tensor.global_offset, block_bytes=block_bytes)
            filled += tensor.data.numel()
    if filled != sum(parameters.values()):
        raise IntegrityError(f"{folder}: {filled} of {sum(parameters.values())} weights of this rank were found")


def local_tensors(state: dict[str, Any]) -> list[Any]:
    """The ShardedTensors of a sharded state dict, gate and up apart; their `data` are views of the parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def check_fits(plan: Plan, tensors: Sequence[Any], *, tp_size: int, where: str) -> None:
    """Compare what this rank holds of a model, its ShardedTensors, with the whole model that `plan` describes.

    Shapes are those of whole tensors, (layers, experts, rows, columns); a vocabulary may be padded to a multiple of the
    tensor-parallel ranks. The layers and ends of the model that are here must be made of the same tensors.

    Raises:
        IntegrityError: naming a tensor and both shapes, or a tensor that one of the two does not have.
    """
    here: dict[str, Packed] = {}
    for tensor in tensors:
        packed = _packed(plan, tensor.key, tuple(tensor.global_offset[: len(tensor.global_offset) - tensor.data.ndim]))
        here[tensor.key] = packed
        wanted, found = (*plan.stack(packed.row), *packed.shape), tuple(tensor.global_shape)
        padding = found[0] - wanted[0]
        padded = packed.row.vocabulary and found[1:] == wanted[1:] and 0 < padding < tp_size
        if found != wanted and not padded:
            raise IntegrityError(
                f"{where} is another model: its {tensor.key} is {list(wanted)}, that of the model to be filled is "
                f"{list(found)}; nothing is cut to fit"
            )
    stages = {packed.row.stage for packed in here.values()}
    for packed in plan.tensors.values():
        if packed.row.stage in stages and packed.key not in here:
            raise IntegrityError(f"{where} is another model: it has {packed.key}, which the model to be filled has not")


def fill(
    target: torch.Tensor,
    plan: Plan,
    view: TensorView,
    key: str,
    offset: tuple[int, ...],
    *,
    block_bytes: int = DEFAULT_BLOCK,
) -> None:
    """Copy into `target` the part of mcore's tensor `key` that begins at `offset`: (layer, expert, row, column).

    Rows past the vocabulary become zero. Raises IntegrityError for a tensor that the plan does not have.
    """
    lead = len(offset) - target.ndim
    packed = _packed(plan, key, tuple(offset[:lead]))
    dtype = view.dtype(packed.pieces[0].hf)
    width = row_bytes(dtype, packed.shape)
    first = offset[lead]
    for start, stop in blocks(target.shape[0], width, block_bytes):
        buffer = bytearray((stop - start) * width)
        packed.gather(view, first + start, memoryview(buffer), width)
        rows = torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(stop - start, *packed.shape[1:])
        if target.ndim > 1:
            rows = rows[:, offset[lead + 1] : offset[lead + 1] + target.shape[1]]
        target[start:stop].copy_(rows)


def _packed(plan: Plan, key: str, place: tuple[int, ...]) -> Packed:
    found = plan.placed.get((key, place))
    if found is None:
        raise IntegrityError(f"the model holds {key} {list(place)}, the table of {plan.table.name} does not")
    return found
