"""Rows dealt to context-parallel ranks: nothing lost, equal places, balanced attention."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megafuse.data.dataset import GroupDataset
from megafuse.data.rows import build_row
from megafuse.data.shard import local_row, owners, visible_keys
from megafuse.model.attention import visible
from megafuse.testing.tiny import write_tiny_dataset


@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.parametrize("sharing", [True, False])
def test_the_parts_of_a_row_are_the_row(tmp_path: Path, ways: int, sharing: bool) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    data = GroupDataset(write_tiny_dataset(tmp_path / "d", "pair", seed=seed))
    groups = [data[i] for i in (2, 5, 8)]
    tokens = sum(len(g.prompt) * len(g.responses) + int(g.response_lengths.sum()) for g in groups)
    row = build_row(groups, prefix_sharing=sharing, row_tokens=-(-tokens // ways) * ways + ways)
    seen: list[tuple[int, int, int, int]] = []
    for rank in range(ways):
        part = local_row(row, rank, ways)
        places = (part.layout[2] == rank).nonzero().flatten()
        assert part.tokens.shape == (1, row.positions.numel() // ways) and torch.equal(part.layout[:2], row.layout)
        assert torch.equal(part.tokens[0], row.tokens[0, places])
        counted = torch.bincount(part.target_response, minlength=row.num_responses)
        assert torch.equal(part.blocks.counts[rank], counted) and part.blocks.counts.shape[0] == ways
        assert torch.equal(part.target_response, torch.repeat_interleave(counted)), "one response after another"
        assert torch.equal(part.positions, row.positions[places])
        seen += zip(
            *(x.tolist() for x in (part.targets, places[part.target_rows], part.target_response)), [rank] * 9999
        )
    whole = sorted(zip(row.targets.tolist(), row.target_rows.tolist(), row.target_response.tolist()))
    assert sorted(x[:3] for x in seen) == whole
    assert local_row(row, 0, 1) is row


def test_every_rank_has_as_many_places_and_nearly_as_many_visible_keys() -> None:
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    for ways in (2, 4, 8):
        segment, parent = [], []
        while len(segment) < 4000:
            prompt = max([-1, *segment]) + 1
            for i, size in enumerate([int(rng.integers(20, 400)), *rng.integers(20, 500, 8).tolist()]):
                segment += [prompt + i] * size
                parent += [prompt] * size
        t = 4096
        layout = torch.tensor([segment[:t] + [-1] * (t - len(segment)), parent[:t] + [-1] * (t - len(parent))])
        owner = owners(layout, ways)
        assert torch.bincount(owner, minlength=ways).tolist() == [t // ways] * ways
        keys = visible(layout[0], layout[1]).sum(1)
        assert torch.equal(visible_keys(layout), keys)
        share = torch.zeros(ways).index_add_(0, owner.long(), keys.float())
        assert share.max() / share.mean() < 1.05, share
