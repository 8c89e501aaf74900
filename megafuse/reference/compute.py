"""Forward-only log-probs of every response of a data set, through the same pipeline that trains."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import groups_of, response_places
from megafuse.data.rows import Row, RowPlanner, build_row
from megafuse.data.shard import local_row
from megafuse.kernels.logprob import segment_logprobs
from megafuse.observe.progress import Progress
from megafuse.parallel.topology import Topology
from megafuse.reference.cache import CacheWriter
from megafuse.training.step import forward_rows, run_model

PART_GROUPS = 64  # groups between two writes: what a kill can lose


def score_groups(
    model: list[Any],
    topology: Topology,
    data: GroupDataset,
    planner: RowPlanner,
    spans: Iterable[tuple[int, int, int]],
    *,
    prefix_sharing: bool,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each (part, first, stop): the part, and log-prob sums [r] float64 and lengths [r] int64 of its responses.

    Every rank must consume the iterator (each step is collective) and gets the same numbers.
    """
    offsets = data.response_offsets
    was_training = model[0].training
    for chunk in model:
        chunk.eval()
    for part, first, stop in spans:
        plan = planner.plan(np.arange(first, stop))
        lengths = plan.lengths[topology.dp_rank]
        rows = [
            build_row(groups_of(data, parts), prefix_sharing=prefix_sharing, row_tokens=length)
            for parts, length in zip(plan.rows[topology.dp_rank], lengths)
        ]
        with torch.no_grad():
            outputs = forward_rows(
                model,
                [local_row(row, topology.cp_rank, topology.cp_size).to(topology.device) for row in rows],
                functools.partial(_forward_step, topology.cp_group),
                lengths=lengths,
                forward_only=True,
            )
        result = torch.zeros(2, int(offsets[stop] - offsets[first]), dtype=torch.float64)
        if topology.is_reporter:
            for row, output in zip(rows, outputs):
                places = response_places(offsets, row.parts) - int(offsets[first])
                result[:, torch.from_numpy(places)] = output.cpu()
        result = topology.sum_over_world(result).cpu()
        yield part, result[0].numpy(), result[1].numpy().astype(np.int64)
    for chunk in model:
        chunk.train(was_training)


def _forward_step(cp_group: Any, source: Iterator[Row], model: Any) -> tuple[Tensor, Any]:
    row = next(source)

    def collect(logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums, lengths = segment_logprobs(logps, row.target_response, row.num_responses, cp_group=cp_group)
        return sums.sum(), torch.zeros((), dtype=torch.int), torch.stack((sums.double(), lengths.double()))

    return run_model(model, row), collect


def write_reference(
    model: list[Any],
    topology: Topology,
    data: GroupDataset,
    planner: RowPlanner,
    folder: Path,
    *,
    name: str,
    digest: dict[str, str],
    source: Path,
    prefix_sharing: bool,
    show_progress: bool,
) -> None:
    """Write (or finish) the cache at `folder` with the log-probs of the weights that `model` holds. Collective."""
    writer = topology.on_rank_zero(
        lambda: CacheWriter(folder, name, digest, data.response_offsets, PART_GROUPS, str(source))
    )
    spans = topology.from_rank_zero(writer.missing())
    done = len(data) - sum(stop - first for _, first, stop in spans)
    with Progress(len(data), f"reference {name}", enabled=show_progress) as progress:
        for part, logps, lengths in score_groups(model, topology, data, planner, spans, prefix_sharing=prefix_sharing):
            topology.on_rank_zero(functools.partial(writer.write, part, logps, lengths))
            done = min(done + PART_GROUPS, len(data))
            progress.update(done, {})
    topology.on_rank_zero(writer.finish)
