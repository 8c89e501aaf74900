"""Groups cut between their terms: the parts, plans of them, and losses and metrics summed over any rows of them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megafuse.bench.synthetic import SyntheticGroups
from megafuse.config.loss import LossConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import Parts, components, data_parts, groups_of, response_places
from megafuse.data.rows import RowPlanner, RowShape, build_row, part_tokens
from megafuse.data.types import Group
from megafuse.errors import DataError
from megafuse.losses.reference import TWINS, Batch
from megafuse.losses.registry import Loss, make_loss
from megafuse.losses.types import ResponseSums
from megafuse.model.arch import ModelArch
from megafuse.testing.parity import LOSSES
from megafuse.testing.tiny import write_tiny_dataset
from megafuse.training.batch import batch_denominator

ARCH = ModelArch(
    architecture="LlamaForCausalLM", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2,
    head_dim=8, vocab_size=120, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    tie_word_embeddings=True, torch_dtype="float32",
)  # fmt: skip


class Groups:
    """What a planner asks of a data set, of groups made up here."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        counts = [len(g.responses) for g in groups]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.response_lengths = np.concatenate([g.response_lengths for g in groups]), starts
        self.response_offsets = starts
        self.prompt_lengths = np.array([len(g.prompt) for g in groups])
        self.group_lengths = self.prompt_lengths + np.add.reduceat(self.response_lengths[0], starts[:-1])
        terms = [[int(start + i) for i in term if i >= 0] for start, g in zip(starts, groups) for term in g.members]
        flat = np.array([i for term in terms for i in term], dtype=np.int64)
        self.term_members = flat, np.concatenate([[0], np.cumsum([len(term) for term in terms])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]


def random_group(index: int, rng: np.random.Generator, kind: str) -> Group:
    """Terms in any order over responses in any order, some of them in none (of kind sft in two)."""
    n = int(rng.integers(3, 9))
    order, terms = rng.permutation(n).tolist(), []
    if kind == "sft":
        terms = [[i] for i in rng.integers(0, n, int(rng.integers(1, n + 1)))]
    elif kind == "rloo":
        while len(order) > 1 and (rng.random() < 0.8 or not terms):
            size = int(rng.integers(2, 4))
            terms, order = [*terms, order[:size]], order[size:]
    else:
        width = 2 if kind == "pair" else 3
        terms = [rng.permutation(n)[:width].tolist() for _ in range(int(rng.integers(1, 4)))]
    members = np.full((len(terms), max(map(len, terms))), -1, dtype=np.int32)
    for row, term in zip(members, terms):
        row[: len(term)] = term
    weights = rng.random(len(terms)) * (rng.random(len(terms)) < 0.8) + 1e-3
    answers = tuple(rng.integers(0, 120, int(rng.integers(1, 12)), dtype=np.int32) for _ in range(n))
    return Group(
        index, f"p{index}", rng.integers(0, 120, int(rng.integers(1, 10)), dtype=np.int32), answers,
        tuple("s" * n), rng.random(n), members, weights / weights.sum(),
    )  # fmt: skip


def planner(data: Any, sharing: bool, budget: int = 8, **shape: Any) -> RowPlanner:
    return RowPlanner(
        data, ARCH, max_row_tokens=budget, max_group_tokens=4096, prefix_sharing=sharing, shape=RowShape(**shape)
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["sft", "pair", "rloo", "wrpo"]), st.integers(8, 80))
def test_every_response_is_once_in_a_row_and_every_term_whole(seed: int, kind: str, budget: int) -> None:
    rng = np.random.default_rng(seed)
    data = Groups([random_group(i, rng, kind) for i in range(int(rng.integers(1, 7)))])
    plans = planner(data, False, budget, dp_size=int(rng.integers(1, 4)), multiple=int(rng.integers(1, 5)))
    batch = rng.permutation(len(data))[: int(rng.integers(1, 7))]
    plan = plans.plan(batch)
    rows = [row for rank in plan.rows for row in rank]
    found = sorted((part.group, i) for row in rows for part in row for i in part.responses)
    assert found == sorted((g, i) for g in batch.tolist() for i in range(len(data[g].responses)))
    terms = []
    for row in rows:
        for part in row:
            own = data[part.group].only(part.responses)  # raises where a term is split
            for term, weight in zip(own.members, own.weights):
                terms.append((part.group, sorted(part.responses[i] for i in term if i >= 0), weight))
            if len(part.responses) > 1:  # and no part could be cut again
                assert components(*flat_terms(own), len(part.responses)).max() == 0
    wanted = [(g, sorted(i for i in t if i >= 0), w) for g in batch for t, w in zip(data[g].members, data[g].weights)]
    assert sorted(terms) == sorted((int(g), list(map(int, t)), w) for g, t, w in wanted)
    longest = max(int(plans.tokens[p]) for p in plans.parts.of(batch))
    assert max(max(lengths) for lengths in plan.lengths) <= max(plans.budget, longest + plans.shape.multiple - 1)
    for part in range(len(plans.tokens)):
        own = groups_of(data, [plans.parts[part]])[0]
        assert plans.tokens[part] == sum(len(own.prompt) + len(r) for r in own.responses)


def flat_terms(group: Group) -> tuple[np.ndarray, np.ndarray]:
    terms = [[int(i) for i in term if i >= 0] for term in group.members]
    return np.array([i for term in terms for i in term]), np.cumsum([0, *map(len, terms)])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_components_are_those_of_a_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    terms = [rng.integers(0, n, int(rng.integers(0, 4))).tolist() for _ in range(int(rng.integers(0, 20)))]
    flat = np.array([i for term in terms for i in term], dtype=np.int64)
    label = components(flat, np.cumsum([0, *map(len, terms)]), n)
    for start in range(n):
        seen = {start}
        while more := {y for term in terms if seen & set(term) for y in term} - seen:
            seen |= more
        assert label[start] == min(seen)


@pytest.mark.parametrize("kind", ["sft", "pair", "rloo", "wrpo", "rank"])
def test_parts_of_data_sets_on_disk_and_of_the_benchmark(kind: str, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    data = GroupDataset(write_tiny_dataset(tmp_path / "d", kind, seed=seed))
    parts = data_parts(data, prefix_sharing=False)
    terms = [tuple(i for i in term if i >= 0) for g in data for term in g.members.tolist()]
    assert [p for g in range(len(data)) for p in parts.of(np.array([g])).tolist()] == list(range(len(parts.groups)))
    if kind == "rank":
        assert all(len(parts[p].responses) == 1 for p in range(len(parts.groups)))
        assert len(parts.groups) == int(data.response_offsets[-1])
    else:
        assert [parts[p].responses for p in range(len(parts.groups))] == terms
    shared = data_parts(data, prefix_sharing=True)
    assert [shared[g].responses for g in range(len(data))] == [tuple(range(len(g.responses))) for g in data]
    assert np.array_equal(part_tokens(data, shared, prefix_sharing=True), data.group_lengths)
    places = response_places(data.response_offsets, [parts[p] for p in parts.of(np.array([5, 2]))])
    starts = data.response_offsets
    assert sorted(places.tolist()) == [*range(starts[2], starts[3]), *range(starts[5], starts[6])]


def test_parts_of_the_benchmarks_groups() -> None:
    from megafuse.bench.lengths import PromptLengths

    lengths = {4: ((3, 1, 2), (2, 2, 5)), 2: ((1, 1, 1),) * 2}
    prompts = [PromptLengths(prompt=prompt, sources=sources) for prompt, sources in lengths.items()]
    pairs: Any = SyntheticGroups(prompts, 2, kind="pair", vocab_size=50, seed=0)
    parts = data_parts(pairs, prefix_sharing=False)
    found = [parts[p] for p in range(len(parts.groups))]
    assert found == [(g, own) for g in (0, 1) for own in ((0, 2), (1,), (3, 5), (4,))]


def test_what_a_term_combines_must_fit_and_is_named() -> None:
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    group = replace(
        random_group(0, rng, "pair"),
        prompt=np.arange(10, dtype=np.int32),
        responses=tuple(np.arange(n, dtype=np.int32) for n in (5, 9, 7)),
        sources=("a",) * 3, rewards=np.zeros(3), members=np.array([[0, 2]], np.int32), weights=np.ones(1),
    )  # fmt: skip
    data: Any = Groups([group])
    assert planner(data, False).plan(np.array([0])).lengths == ((32, 19),)
    with pytest.raises(DataError, match=r"needs 32 tokens in one row for its responses 0, 2, which a term .*31"):
        RowPlanner(data, ARCH, max_row_tokens=31, prefix_sharing=False)
    with pytest.raises(ValueError, match=r"responses \(0, 1\) split the term over \[0, 2\]"):
        group.only((0, 1))


def summed(data: Any, plan: Any, loss: Loss, values: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any], Any]:
    """Loss, metrics and the gradient by the response sums, row by row as a step takes them."""
    logps = values["logps"].clone().requires_grad_()
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for parts in (row for rank in plan.rows for row in rank):
        row = build_row(groups_of(data, parts), prefix_sharing=False, row_tokens=4096)
        places = torch.from_numpy(response_places(data.response_offsets, parts))
        sums = ResponseSums(logps[places], values["lengths"][places], values["rewards"][places], values["refs"][places])
        terms = replace(row.terms, weights=row.terms.weights.double())
        own, found = loss(sums, terms, 0.5)
        total = total + own.sum() / batch_denominator(loss, data, plan)
        for name, pair in found.items():
            metrics[name] = metrics.get(name, 0) + pair
    (gradient,) = torch.autograd.grad(total, logps, allow_unused=True)
    return float(total.detach()), metrics, gradient


def whole_batch(data: Any, loss: Loss, values: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any], torch.Tensor]:
    """The same by the twin over undivided groups; the gradient by differences (rloo: with its rewards held)."""
    terms, starts = [], data.response_offsets
    for g, group in enumerate(data):
        for term, weight in zip(group.members, group.weights):
            terms.append(([int(starts[g] + i) for i in term if i >= 0], float(np.float32(weight)), g))
    batch = Batch(
        values["logps"].tolist(), values["refs"].tolist(), values["lengths"].tolist(), values["rewards"].tolist(),
        terms, len(data),
    )  # fmt: skip
    options = dict(loss.settings)
    if loss.name == "wrpo":
        options["alpha"] = options.pop("alpha_max") * 0.5
    over = sum(loss.denominator(g.members, g.weights, g.response_lengths) for g in data)
    losses, metrics = TWINS[loss.name](batch, **options)
    gradient = torch.zeros(len(batch.logps), dtype=torch.float64)
    held = {"constant_logps": batch.logps} if loss.name == "rloo" else {}
    for i in range(len(gradient)):
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 1e-5 * (i == j) for j, x in enumerate(batch.logps)]
            ends.append(sum(TWINS[loss.name](replace(batch, logps=moved), **options, **held)[0]))
        gradient[i] = (ends[0] - ends[1]) / 2e-5 / over
    return sum(losses) / over, metrics, gradient


def problem(kind: str, rng: np.random.Generator) -> tuple[Any, dict[str, torch.Tensor]]:
    """Random groups, the first of two parts so long that they never share a row of the smallest budget."""
    width = {"sft": 1, "pair": 2, "rloo": 3, "wrpo": 3}[kind]
    answers = tuple(rng.integers(0, 120, 90, dtype=np.int32) for _ in range(2 * width))
    first = Group(
        0, "long", np.zeros(1, np.int32), answers, tuple("s" * 2 * width), rng.random(2 * width),
        np.arange(2 * width, dtype=np.int32).reshape(2, width), np.array([0.3, 0.7]),
    )  # fmt: skip
    data = Groups([first, *(random_group(i, rng, kind) for i in range(1, 4))])
    n = int(data.response_offsets[-1])
    logps = torch.from_numpy(rng.normal(-20, 4, n))
    refs = logps + torch.from_numpy(rng.normal(0, 0.1, n))
    lengths = torch.from_numpy(data.response_lengths[0])
    return data, {"logps": logps, "refs": refs, "lengths": lengths, "rewards": torch.from_numpy(rng.random(n)).float()}


@pytest.mark.parametrize("name", [*LOSSES])
def test_rows_of_parts_add_up_to_the_loss_and_metrics_of_whole_groups(name: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = np.random.default_rng(seed)
    loss = make_loss(LossConfig.model_validate(LOSSES[name]))
    data, values = problem(loss.kind, rng)
    value, metrics, gradient = whole_batch(data, loss, values)
    for budget, ranks in ((8, 1), (8, 2), (60, 2), (4096, 1)):
        plan = planner(data, False, budget, dp_size=ranks).plan(rng.permutation(len(data)))
        if budget == 8:
            assert sum(any(part.group == 0 for part in row) for rank in plan.rows for row in rank) == 2
        found, own, slope = summed(data, plan, loss, values)
        assert found == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert own.keys() == metrics.keys()
        for key, pair in metrics.items():
            least = 1e-6 if key == "reward_margin" else 1e-9  # differences of float32 rewards below 1, which may cancel
            assert own[key].tolist() == pytest.approx(pair, rel=1e-6, abs=least), key
        assert own["weight_entropy"][1] == len(data)  # each group once, exactly
        assert float((slope - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max())


def test_the_sums_notice_a_group_that_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    loss = make_loss(LossConfig.model_validate(LOSSES["sft"]))
    data, values = problem("sft", rng)
    only = Group.only
    monkeypatch.setattr(Group, "only", lambda self, own: replace(only(self, own), counted=True))
    plan = planner(data, False).plan(np.arange(len(data)))
    assert summed(data, plan, loss, values)[1]["weight_entropy"][1] > len(data)


def test_a_split_term_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    data, values = problem("pair", rng)
    monkeypatch.setattr("megafuse.data.parts.components", lambda members, offsets, n: np.arange(n))
    plan = planner(data, False).plan(np.arange(len(data)))
    with pytest.raises(ValueError, match="split the term"):
        summed(data, plan, make_loss(LossConfig.model_validate(LOSSES["dpo"])), values)


def test_groups_are_parts_of_their_own_where_prompts_are_shared() -> None:
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    data, _ = problem("sft", rng)
    parts: Parts = planner(data, True).parts
    assert groups_of(data, [parts[g] for g in range(len(data))]) == [data[g] for g in range(len(data))]
