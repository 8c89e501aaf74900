"""One rank's parameters straight from a Hugging Face folder, at any layout, reading only that rank's rows.

Not needed to load a checkpoint (mcore reshards those itself): it is the independent statement of what every rank must
hold, which the tests compare with what mcore loaded.
"""

from collections.abc import Iterator

import torch

from megafuse.converters.plan import Packed, Plan
from megafuse.converters.views import TORCH_DTYPES, TensorView, row_bytes
from megafuse.errors import ConfigError


def stage_layers(layers: int, pp: int, pp_rank: int, vpp: int = 1, vpp_rank: int = 0) -> range:
    """Layers of one (virtual) pipeline stage: chunk `vpp_rank` of rank `pp_rank`, even split.

    Raises ConfigError where the layers do not divide.
    """
    per_stage, rest = divmod(layers, pp * vpp)
    if rest:
        raise ConfigError(f"{layers} layers do not divide into {pp} pipeline stages x {vpp} virtual stages")
    start = (vpp_rank * pp + pp_rank) * per_stage
    return range(start, start + per_stage)


def rank_state_dict(
    plan: Plan,
    source: TensorView,
    *,
    tp: int = 1,
    tp_rank: int = 0,
    pp: int = 1,
    pp_rank: int = 0,
    vpp: int = 1,
    vpp_rank: int = 0,
    ep: int = 1,
    ep_rank: int = 0,
    expert_tp: int | None = None,
    expert_tp_rank: int = 0,
    padded_vocab: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, tensor) of every parameter of one rank, one at a time.

    Layer numbers are local to the stage, expert numbers to the rank.
    expert_tp, expert_tp_rank: tensor parallelism of the experts where it is another than `tp`.
    padded_vocab: rows of the embedding and output layer over all ranks; rows past the vocabulary are zero.
    A tied model's last stage gets its copy of the embedding as `output_layer.weight`, as in mcore.
    Raises ConfigError where a dimension does not divide.
    """
    per_rank = _divide(plan.model.num_experts or 0, ep, "experts", by="expert")
    experts = range(ep_rank * per_rank, (ep_rank + 1) * per_rank)
    layers = stage_layers(plan.model.num_layers, pp, pp_rank, vpp, vpp_rank)
    first = pp_rank == 0 and vpp_rank == 0
    last = pp_rank == pp - 1 and vpp_rank == vpp - 1
    held = {"first": first, "last": last, "layer": True}
    for packed in plan.tensors.values():
        if not held[packed.row.stage] or (packed.layer is not None and packed.layer not in layers):
            continue
        if packed.expert is not None and packed.expert not in experts:
            continue
        name = packed.row.mcore
        if packed.layer is not None:
            name = name.replace("{i}", str(packed.layer - layers.start))
        if packed.expert is not None:
            name = name.replace("{e}", str(packed.expert - experts.start))
        ways = (tp, tp_rank) if expert_tp is None or packed.expert is None else (expert_tp, expert_tp_rank)
        yield name, _slice(plan, packed, source, *ways, padded_vocab)
    if last and not first and plan.tied_twin:
        embedding = next(p for p in plan.tensors.values() if p.row.stage == "first" and p.row.vocabulary)
        yield "output_layer.weight", _slice(plan, embedding, source, tp, tp_rank, padded_vocab)


def _slice(
    plan: Plan, packed: Packed, source: TensorView, tp: int, tp_rank: int, padded_vocab: int | None
) -> torch.Tensor:
    """The tensor-parallel part of one packed tensor, as a fresh contiguous tensor."""
    dtype = source.dtype(packed.pieces[0].hf)
    width = row_bytes(dtype, packed.shape)
    rows = padded_vocab if packed.row.vocabulary and padded_vocab else packed.shape[0]
    whole = [(0, rows)]
    if packed.row.tp == 0 and packed.row.pack == "concat" and len(packed.pieces) > 1:
        whole = [(piece.at, piece.rows) for piece in packed.pieces]  # gate and up are cut one by one
    if packed.row.tp == 0:
        if packed.row.pack == "grouped":
            _divide(plan.model.num_kv_heads, tp, "KV heads")
        whole = [(at + tp_rank * _divide(n, tp, packed.name), _divide(n, tp, packed.name)) for at, n in whole]
    buffer = torch.empty(sum(n for _, n in whole) * width, dtype=torch.uint8)
    out, done = buffer.numpy().data, 0
    for at, n in whole:
        packed.gather(source, at, out[done : done + n * width], width)
        done += n * width
    tensor = buffer.view(TORCH_DTYPES[dtype]).reshape(-1, *packed.shape[1:])
    if packed.row.tp == 1:
        columns = _divide(packed.shape[1], tp, packed.name)
        tensor = tensor[:, tp_rank * columns : (tp_rank + 1) * columns].contiguous()
    return tensor


def _divide(size: int, ways: int, what: str, by: str = "tensor") -> int:
    if size % ways:
        raise ConfigError(f"{what}: {size} is not divisible by {by} parallelism {ways}")
    return size // ways
