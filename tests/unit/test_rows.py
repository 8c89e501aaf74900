"""Rows of groups against a naive construction; the plan of a global batch; the sampler."""

import itertools
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.config.train import ParallelConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import groups_of
from megafuse.data.rows import BatchPlan, RowPlanner, RowShape, block_sizes, build_row, row_shape, warnings_of
from megafuse.data.sampler import BatchSampler
from megafuse.data.tokenise import ChatTokenizer
from megafuse.errors import ConfigError, DataError
from megafuse.model.arch import ModelArch, read_arch
from megafuse.model.attention import visible
from megafuse.model.flex import TILE
from megafuse.testing.tiny import write_tiny_dataset, write_tiny_llama
from megafuse.testing.tokenizer import make_tokenizer

ARCH = ModelArch(
    architecture="LlamaForCausalLM", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2,
    head_dim=8, vocab_size=120, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    tie_word_embeddings=True, torch_dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module", params=["sft", "pair", "rloo", "wrpo", "rank"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return GroupDataset(write_tiny_dataset(tmp_path_factory.mktemp("rows") / "d", request.param, seed=seed))


@pytest.mark.parametrize("sharing", [True, False])
def test_every_target_sees_exactly_its_prompt_and_its_own_past(data: GroupDataset, sharing: bool) -> None:
    groups = [data[i] for i in (3, 0, 7)]
    tokens = sum(len(g.prompt) * (1 if sharing else len(g.responses)) + int(g.response_lengths.sum()) for g in groups)
    row = build_row(groups, prefix_sharing=sharing, row_tokens=tokens + 5)
    assert row.tokens.shape == (1, tokens + 5) and row.layout.shape == (2, tokens + 5)
    assert (row.layout[:, tokens:] == -1).all() and (row.layout[:, :tokens] >= 0).all()
    mask = visible(row.layout[0], row.layout[1])
    place = response = 0
    for group in groups:
        for own in group.responses:
            whole = np.concatenate([group.prompt, own])
            for j, token in enumerate(own):
                assert int(row.targets[place]) == token and int(row.target_response[place]) == response
                at = int(row.target_rows[place])
                seen = mask[at].nonzero().flatten()
                assert row.tokens[0, seen].tolist() == whole[: len(group.prompt) + j].tolist()
                assert row.positions[seen].tolist() == list(range(len(group.prompt) + j))
                place += 1
            response += 1
    assert place == len(row.targets) and response == row.num_responses
    assert row.rewards.tolist() == pytest.approx(np.concatenate([g.rewards for g in groups]).tolist())


def test_terms_point_at_the_responses_of_their_group(data: GroupDataset) -> None:
    groups = [data[i] for i in (1, 4)]
    row = build_row(groups, prefix_sharing=True, row_tokens=4096)
    wanted, first = [], 0
    for g, group in enumerate(groups):
        for term, weight in zip(group.members, group.weights):
            wanted.append(([int(i) + first for i in term if i >= 0], pytest.approx(weight), g))
        first += len(group.responses)
    found = [
        ([i for i in members if i >= 0], weight, g)
        for members, weight, g in zip(row.terms.members.tolist(), row.terms.weights.tolist(), row.terms.group.tolist())
    ]
    assert found == wanted and row.terms.num_groups == 2


def test_blocks_are_the_shortest_runs_that_no_term_leaves(data: GroupDataset) -> None:
    row = build_row([data[i] for i in (5, 2, 7)], prefix_sharing=True, row_tokens=2048)
    assert sum(row.blocks.sizes) == row.num_responses and all(size > 0 for size in row.blocks.sizes)
    block = np.repeat(np.arange(len(row.blocks.sizes)), row.blocks.sizes)
    terms = [[block[y] for y in members if y >= 0] for members in row.terms.members.tolist()]
    assert all(len(set(term)) == 1 for term in terms)
    assert torch.equal(row.blocks.counts[0], torch.bincount(row.target_response, minlength=row.num_responses))
    used = {y for members in row.terms.members.tolist() for y in members if y >= 0}
    assert row.idle == (len(used) < row.num_responses)
    for b, size in enumerate(row.blocks.sizes):  # no run can be cut once more
        first = int((block < b).sum())
        for cut in range(first + 1, first + size):
            spans = [[y for y in members if y >= 0] for members in row.terms.members.tolist()]
            assert any(min(m) < cut <= max(m) for m in spans)
    assert block_sizes(np.array([[0, 2, -1], [3, 3, 3], [6, 5, -1]]), 8) == (3, 1, 1, 2, 1)


def test_an_empty_row_is_all_padding() -> None:
    row = build_row([], prefix_sharing=True, row_tokens=4)
    assert row.num_responses == 0 and row.terms.num_groups == 0 and row.terms.members.shape[0] == 0
    assert (row.layout == -1).all() and len(row.targets) == 0


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_plan_counts_what_the_rows_hold(data: GroupDataset, sharing: bool, ranks: int) -> None:
    shape = RowShape(dp_size=ranks, multiple=4)
    arch = replace(ARCH, num_layers=3, window=7, window_layers=(1,))
    planner = RowPlanner(data, arch, max_row_tokens=300, prefix_sharing=sharing, shape=shape)
    batch = np.array([5, 2, 9, 11, 0])
    plan = planner.plan(batch)
    rows = [
        build_row(groups_of(data, parts), prefix_sharing=sharing, row_tokens=length)
        for rank, lengths in zip(plan.rows, plan.lengths)
        for parts, length in zip(rank, lengths)
    ]
    assert len({len(rank) for rank in plan.rows}) == 1 and len(plan.rows) == ranks
    assert all(length % 4 == 0 for lengths in plan.lengths for length in lengths)
    found = sorted((part.group, response) for row in rows for part in row.parts for response in part.responses)
    assert found == sorted((g, response) for g in batch.tolist() for response in range(len(data[g].responses)))
    assert plan.computed_tokens == sum(row.tokens.numel() for row in rows)
    assert plan.model_tokens == sum(int((row.layout[0] >= 0).sum()) for row in rows)
    pairs = 0
    for row in rows:
        seen = visible(row.layout[0], row.layout[1])
        near = row.positions[:, None] - row.positions[None] < 7
        pairs += 2 * int(seen.sum()) + int((seen & near).sum())
    assert plan.pairs == pairs
    assert plan.head_rows == sum(len(row.target_rows.unique()) for row in rows)
    lengths = [len(data[int(g)].prompt) + int(data[int(g)].response_lengths.sum()) for g in batch]
    assert plan.useful_tokens == sum(lengths) and plan.groups == 5


def test_rows_get_the_lengths_that_the_layout_asks_for(data: GroupDataset) -> None:
    batch = np.arange(len(data))
    longest = int(data.group_lengths.max())

    def plan(lengths: Any, count_multiple: int = 1) -> BatchPlan:
        shape = RowShape(dp_size=2, multiple=3, count_multiple=count_multiple, lengths=lengths)
        return RowPlanner(data, ARCH, max_row_tokens=longest + 8, prefix_sharing=True, shape=shape).plan(batch)

    own, padded, fixed, stage = plan("own"), plan("padded"), plan("fixed"), plan("stage")
    for rank in range(2):
        tokens = [int(data.group_lengths[[part.group for part in row]].sum()) for row in own.rows[rank]]
        assert own.lengths[rank] == tuple(-(-max(n, 1) // 3) * 3 for n in tokens)
        assert set(padded.lengths[rank]) == {max(own.lengths[rank])}
        assert set(fixed.lengths[rank]) == {(longest + 8) // 3 * 3}
        wasteful = sum(padded.lengths[rank]) > 1.02 * sum(own.lengths[rank])
        assert stage.lengths[rank] == (own if wasteful else padded).lengths[rank]
    for multiple in (4, 7, 40):
        turns = plan("padded", multiple)
        assert all(len(rank) % multiple == 0 and len(rank) - len(own.rows[0]) < multiple for rank in turns.rows)
        found = [sorted(part.group for row in rank for part in row) for rank in turns.rows]
        assert sorted(g for rank in found for g in rank) == batch.tolist()
        assert found == [sorted(part.group for row in rank for part in row) for rank in own.rows]


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (3, 1), (4, 1), (1, 2), (2, 2), (4, 3)])
@pytest.mark.parametrize("sequence", [False, True])
def test_flex_gets_whole_tiles_on_every_rank(data: GroupDataset, tensor: int, context: int, sequence: bool) -> None:
    parallel = ParallelConfig(tensor=tensor, context=context, sequence=sequence and tensor > 1)
    policy: Any = SimpleNamespace(tp_comm_overlap=False)
    flex, sdpa = (row_shape(parallel, 2, SimpleNamespace(attention=name, policy=policy)) for name in ("flex", "sdpa"))
    assert flex.tile == TILE and sdpa.tile == 1
    plan = RowPlanner(data, ARCH, max_row_tokens=4 * flex.multiple, prefix_sharing=True, shape=flex).plan(np.arange(9))
    for length in itertools.chain(*plan.lengths):
        # what a context-parallel rank's queries are, and, with sequence parallelism, what a tensor-parallel rank holds
        assert length % (context * TILE) == 0 and length % (context * (tensor if parallel.sequence else 1)) == 0
    assert flex.multiple == math.lcm(TILE, tensor if parallel.sequence else 1) * context  # and no more padding
    with pytest.raises(
        ConfigError, match=rf"100 is less than one place of 128 tokens, .* raise it to {flex.multiple}"
    ) as told:
        RowPlanner(data, ARCH, max_row_tokens=100, prefix_sharing=True, shape=flex)
    assert ("parallel.context" in str(told.value)) == (flex.multiple > TILE)  # what would not help is not advised


def test_a_group_longer_than_a_row_gets_a_longer_row_up_to_the_stated_limit(data: GroupDataset) -> None:
    longest, size = int(data.group_lengths.argmax()), int(data.group_lengths.max())
    with pytest.raises(DataError, match=rf"group {longest} .*needs {size} tokens.*max_group_tokens allows {size - 1}"):
        RowPlanner(data, ARCH, max_row_tokens=8, max_group_tokens=size - 1, prefix_sharing=True)
    planner = RowPlanner(data, ARCH, max_row_tokens=size - 1, max_group_tokens=size, prefix_sharing=True)
    assert max(planner.plan(np.array([longest])).lengths[0]) == size
    others = np.array([g for g in range(len(data)) if data.group_lengths[g] < size])
    assert max(planner.plan(others).lengths[0]) < size
    with pytest.raises(ConfigError, match=r"max_row_tokens = 8 is less than one place for each of the 16 parts"):
        RowPlanner(data, ARCH, max_row_tokens=8, prefix_sharing=True, shape=RowShape(multiple=16))


def test_every_epoch_visits_every_group_once_in_its_own_order() -> None:
    sampler = BatchSampler(groups=23, batch_size=5, epochs=3, seed=1)
    assert sampler.steps_per_epoch == 5 and sampler.total_steps == 15
    epochs = [np.concatenate([sampler.batch(5 * e + i) for i in range(5)]) for e in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = BatchSampler(groups=23, batch_size=5, epochs=3, seed=1)
    assert torch.equal(torch.from_numpy(again.batch(7)), torch.from_numpy(sampler.batch(7)))
    assert not np.array_equal(BatchSampler(23, 5, 3, 2).batch(0), sampler.batch(0))


def test_vocabulary_files_of_another_model_are_told(tmp_path: Path) -> None:
    """Sizes alone do not tell Llama's ids from Qwen's."""
    write_tiny_llama(tmp_path / "bare", seed=1)  # no tokenizer: nothing to compare
    for name, vocab in (("own", 512), ("other", 500)):
        write_tiny_llama(tmp_path / name, seed=1, vocab=512)
        make_tokenizer(tmp_path / name, vocab)
    (tmp_path / "checkpoint").mkdir()
    shutil.copytree(tmp_path / "own", tmp_path / "checkpoint" / "hf")
    arch = read_arch(tmp_path / "own")
    digest = {"tokenizer": ChatTokenizer(tmp_path / "own").digest}
    data: Any = SimpleNamespace(path=tmp_path / "data", manifest={"digest": digest})
    for name in ("bare", "own", "checkpoint"):
        assert warnings_of(data, arch, tmp_path / name) == []
    (told,) = warnings_of(data, arch, tmp_path / "other")
    assert "other vocabulary files" in told and str(tmp_path / "other") in told
