"""One global batch's loss, log-probs and per-parameter gradients: in float64 without Megatron, and at any layout."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.checkpoint.state import model_state
from megafuse.config.loss import LossConfig
from megafuse.converters.plan import Plan
from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import groups_of, response_places
from megafuse.data.rows import RowPlanner, build_row
from megafuse.data.shard import local_row
from megafuse.data.types import Group
from megafuse.losses.registry import make_loss
from megafuse.parallel.topology import Topology
from megafuse.reference.compute import score_groups
from megafuse.testing.oracle import group_loss, hf_gradients, response_logps
from megafuse.training import loop
from megafuse.training.grad_norms import grad_norms, total_norm
from megafuse.training.optim import Engine
from megafuse.training.step import RowInput, backward, reduce_metrics

PROGRESS = 0.5  # where in WRPO's schedule the batch stands


@dataclass(frozen=True)
class BatchFacts:
    """What a batch comes to. Gradients are float64 by canonical mcore name, layers (and experts) stacked in front."""

    loss: float
    magnitude: float  # the loss with every summand taken by its absolute value, see testing.oracle; of an oracle only
    logps: np.ndarray  # [n] float64: sums of all responses of the data set, in its order
    gradients: dict[str, Tensor]
    norm: float  # of the whole gradient, as it is clipped by
    norms: dict[str, float]  # by part of the model, see training.grad_norms


@dataclass(frozen=True)
class Difference:
    """How far two BatchFacts are apart, relative to the second: the worst of each kind, and which parameter it is."""

    loss: float
    logps: float
    gradient: float
    parameter: str
    norm: float  # of the whole gradient's norm, and of those of its parts relative to it
    own_norm: float  # of the first one's norm, to that of its own gradients in float64

    @property
    def worst(self) -> float:
        """The largest difference to the second."""
        return max(self.loss, self.logps, self.gradient, self.norm)


def denominator(config: LossConfig, groups: Sequence[Group]) -> float:
    """What the oracle divides the batch's loss by: groups, or for `token_mean` weighted tokens."""
    if config.reduction != "token_mean":
        return float(len(groups))
    return sum(float((g.weights * g.response_lengths[g.members[:, 0]]).sum()) for g in groups)


def oracle_facts(model: Any, plan: Plan, config: LossConfig, data: GroupDataset, ref: np.ndarray) -> BatchFacts:
    """All groups of `data` as one batch through transformers' float64 `model`; `ref` [n] are reference log-probs."""
    model.zero_grad()
    groups = [data[i] for i in range(len(data))]
    over = denominator(config, groups)
    loss = magnitude = 0.0
    sums, at = [], 0
    for group in groups:
        logps = response_logps(model, group)
        frozen = torch.from_numpy(ref[at : at + len(logps)])
        at += len(logps)
        value, size = group_loss(config, group, logps, frozen, PROGRESS)
        (value / over).backward()
        loss, magnitude = loss + value.item() / over, magnitude + size / over
        sums.append(logps.detach().numpy())
    gradients = stacked(plan, hf_gradients(model))
    norms = norms_by_part(gradients)
    return BatchFacts(loss, magnitude, np.concatenate(sums), gradients, hypot(*norms.values()), norms)


def norms_by_part(gradients: dict[str, Tensor]) -> dict[str, float]:
    """What `training.grad_norms` should find, from whole gradients by canonical name."""
    squares: dict[str, float] = defaultdict(float)
    for key, value in gradients.items():
        if key.startswith("decoder.layers."):
            for number, layer in enumerate(value):
                squares[f"layers.{number}"] += float(layer.square().sum())
        else:
            squares[key.removeprefix("decoder.").split(".")[0]] += float(value.square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def stacked(plan: Plan, by_hf_name: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by Hugging Face name -> by canonical mcore name, each with its layers (and experts) in front."""
    result: dict[str, Tensor] = {}
    for packed in plan.tensors.values():
        part = torch.cat([by_hf_name[p.hf][p.start : p.start + p.rows] for p in packed.pieces]).double()
        stack = plan.stack(packed.row)
        result.setdefault(packed.key, torch.zeros(*stack, *part.shape, dtype=torch.float64))[packed.place] = part
    return result


def layout_facts(
    engine: Engine,
    topology: Topology,
    planner: RowPlanner,
    config: LossConfig,
    data: GroupDataset,
    ref: np.ndarray,
    logps: np.ndarray,
    *,
    prefix_sharing: bool,
) -> BatchFacts | None:
    """The same batch through the training step's own code at this layout, on rank 0; `logps` are `layout_logps`'."""
    loss = make_loss(config)
    plan = planner.plan(np.arange(len(data)))
    offsets, lengths = data.response_offsets, plan.lengths[topology.dp_rank]
    rows = []
    for parts, length in zip(plan.rows[topology.dp_rank], lengths):
        row = build_row(groups_of(data, parts), prefix_sharing=prefix_sharing, row_tokens=length)
        frozen = torch.from_numpy(ref[response_places(offsets, parts)]).to(topology.device)
        rows.append(RowInput(local_row(row, topology.cp_rank, topology.cp_size).to(topology.device), frozen))
    over = loop.batch_denominator(loss, data, plan)
    outputs = backward(engine, topology, loss, rows, lengths=lengths, denominator=over, progress=PROGRESS)
    value = reduce_metrics(topology, outputs)["loss"][0]
    engine.optimizer.prepare_grads()
    norms = grad_norms(engine, topology)
    gradients = gathered_gradients(engine, topology)
    return None if gradients is None else BatchFacts(value, abs(value), logps, gradients, total_norm(norms), norms)


def layout_logps(
    engine: Engine, topology: Topology, planner: RowPlanner, data: GroupDataset, *, prefix_sharing: bool
) -> np.ndarray:
    """Log-prob sums [n] float64 of all responses of `data` at this layout. Collective."""
    spans = [(0, 0, len(data))]
    scored = score_groups(engine.model, topology, data, planner, spans, prefix_sharing=prefix_sharing)
    return next(iter(scored))[1]


def gathered_gradients(engine: Engine, topology: Topology) -> dict[str, Tensor] | None:
    """The reduced gradients of every parameter, whole, by canonical name, float64. On rank 0. Collective.

    mcore's own sharded state dict says which part of which tensor a rank holds; gradients stand in for parameters. A
    bf16 parameter holds an fp32 gradient in two goes, what it rounds to and the rest: 16 bits of mantissa.
    """
    for chunk in engine.model:
        if chunk.ddp_config.use_distributed_optimizer:
            _complete_shards(chunk)
    params = [p for chunk in engine.bare for p in chunk.parameters()]
    values = [p.detach().clone() for p in params]
    rest = [p.main_grad.detach().clone() for p in params]
    whole: dict[str, Tensor] | None = None
    with torch.no_grad():
        for _ in range(1 if all(p.dtype == torch.float32 for p in params) else 2):
            for p, gradient in zip(params, rest):
                p.copy_(gradient)
                gradient.sub_(p)
            whole = _added(whole, topology.gather_on_rank_zero(_owned(model_state(engine.bare, topology))))
        for p, value in zip(params, values):
            p.copy_(value)
    return whole


def _added(whole: dict[str, Tensor] | None, parts: list[list[Any]] | None) -> dict[str, Tensor] | None:
    """`whole` plus the tensors that the ranks' `parts` make up; what no rank holds is NaN."""
    if parts is None:
        return None
    found: dict[str, Tensor] = {}
    for key, shape, place, value in (part for rank in parts for part in rank):
        target = found.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))[place]
        target.copy_(torch.from_numpy(value).view(target.shape))
    return found if whole is None else {key: whole[key] + value for key, value in found.items()}


def _complete_shards(chunk: Any) -> None:
    """The distributed optimizer leaves each rank the reduced sum of its own shard of a bucket: gather the others."""
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _owned(state: dict[str, Any]) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]:
    """(key, whole shape, place, values) of the tensors of a sharded state dict that this rank is the one to save."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    apply_factories(state)
    tensors = [t for t in nested_values(state) if isinstance(t, ShardedTensor) and is_main_replica(t.replica_id)]
    return [(t.key, t.global_shape, t.global_slice(), t.data.detach().double().cpu().numpy()) for t in tensors]


def compare(found: BatchFacts, exact: BatchFacts) -> Difference:
    """Relative differences of `found` to `exact`.

    A gradient by its norm, layer by layer and expert by expert, relative to the norm it should have (at least 1e-4 of
    the whole gradient's: an expert without tokens has none). Log-probs relative to the largest of them.
    """
    total = sum(float(g.square().sum()) for g in exact.gradients.values()) ** 0.5
    worst, name = 0.0, ""
    missing = found.gradients.keys() ^ exact.gradients.keys()
    if missing:
        return Difference(np.inf, np.inf, np.inf, f"one side only: {sorted(missing)[0]}", np.inf, np.inf)
    for key, wanted in exact.gradients.items():
        got = found.gradients[key]
        if got.shape != wanted.shape and got.shape[1:] == wanted.shape[1:]:
            got = got[: len(wanted)]  # rows of the padded vocabulary
        kept = wanted.ndim - min(wanted.ndim, 1 if "norm" in key or key.endswith("bias") else 2)
        axes = tuple(range(kept, wanted.ndim))
        error = (got - wanted).square().sum(axes).sqrt()
        size = wanted.square().sum(axes).sqrt().clamp(min=1e-4 * total)
        share = torch.nan_to_num(error / size, nan=np.inf)
        if float(share.max()) >= worst:
            worst = float(share.max())
            place = [int(i) for i in np.unravel_index(int(share.argmax()), share.shape)] if kept else ""
            name = f"{key} {place}".strip()
    logps = float(np.abs(found.logps - exact.logps).max() / np.abs(exact.logps).max())
    pairs = [(found.norm, exact.norm), *((found.norms.get(part, np.inf), norm) for part, norm in exact.norms.items())]
    norm = max(abs(a - b) for a, b in pairs) / exact.norm if found.norms.keys() == exact.norms.keys() else np.inf
    own = hypot(*norms_by_part(found.gradients).values())
    return Difference(
        float(abs(found.loss - exact.loss) / exact.magnitude), logps, worst, name, norm, abs(found.norm / own - 1)
    )
