"""A planned global batch as this rank's rows, and what its loss is divided by."""

import torch

from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import groups_of
from megafuse.data.rows import BatchPlan, build_row
from megafuse.data.shard import local_row
from megafuse.losses.registry import Loss
from megafuse.parallel.topology import Topology
from megafuse.reference.cache import ReferenceLogps
from megafuse.training.step import RowInput


def input_rows(
    topology: Topology,
    data: GroupDataset,
    plan: BatchPlan,
    reference: ReferenceLogps | None,
    *,
    prefix_sharing: bool,
) -> list[RowInput]:
    """This rank's rows of `plan`, on its device, with the reference log-probs of their responses where there are."""
    rows = []
    for parts, length in zip(plan.rows[topology.dp_rank], plan.lengths[topology.dp_rank]):
        row = build_row(groups_of(data, parts), prefix_sharing=prefix_sharing, row_tokens=length)
        logps = None
        if reference is not None:
            logps = torch.from_numpy(reference.of_parts(row.parts)).to(topology.device)
        rows.append(RowInput(local_row(row, topology.cp_rank, topology.cp_size).to(topology.device), logps))
    return rows


def batch_denominator(loss: Loss, data: GroupDataset, plan: BatchPlan) -> float:
    """What the loss of a global batch is divided by: its groups, or for `token_mean` its weighted tokens."""
    if loss.settings.get("reduction") != "token_mean":
        return float(plan.groups)
    parts = (part for rank in plan.rows for row in rank for part in row)
    groups = (data[g] for g in dict.fromkeys(part.group for part in parts))  # once, in however many rows it lies
    return sum(loss.denominator(g.members, g.weights, g.response_lengths) for g in groups)
