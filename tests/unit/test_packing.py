"""Group packing: properties on random inputs, quality on real lengths, and a reference that counts masks."""

import gzip
import importlib
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafuse.errors import ConfigError, DataError, MegafuseError
from megafuse.kernels import packing

DATA = Path(__file__).parents[2] / "../shared/data/alpacaeval_fusion.jsonl.gz"
CHARS_PER_TOKEN = 4.3  # of English under the tokenizers of small models

budgets = st.integers(1, 400)


@st.composite
def batches(draw, max_groups=60):
    budget = draw(budgets)
    tokens = draw(st.lists(st.integers(1, budget), min_size=1, max_size=max_groups))
    cost = draw(st.lists(st.floats(0, 1e12), min_size=len(tokens), max_size=len(tokens)))
    return np.array(tokens), np.array(cost), budget


@st.composite
def ragged(draw):
    prompt = draw(st.lists(st.integers(0, 9), max_size=6))
    response = [draw(st.lists(st.integers(0, 9), max_size=4)) for _ in prompt]
    return prompt, response


def flatten(response):
    return [x for group in response for x in group], np.cumsum([0] + [len(group) for group in response])


def as_lists(plan):
    return [[row.tolist() for row in rows] for rows in plan]


def assert_partition(rows, tokens, budget):
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(tokens)))
    for row in rows:
        assert row.dtype == np.int64 and np.all(np.diff(row) > 0)
        assert tokens[row].sum() <= budget


def first_fit_decreasing(tokens, budget):
    """Reference: the number of rows that plain first-fit decreasing needs."""
    free = []
    for t in sorted(tokens, reverse=True):
        for i, room in enumerate(free):
            if t <= room:
                free[i] -= t
                break
        else:
            free.append(budget - t)
    return len(free)


def fewest_rows(tokens, budget):
    """Reference: the exact optimum, by trying every placement of at most 8 groups."""

    def place(i, free):
        if i == len(tokens):
            return len(free)
        fits = [
            place(i + 1, [*free[:j], room - tokens[i], *free[j + 1 :]])
            for j, room in enumerate(free)
            if room >= tokens[i]
        ]
        return min([*fits, place(i + 1, [*free, budget - tokens[i]])])

    return place(0, [])


@given(batches())
def test_rows_partition_groups_within_budget(batch):
    tokens, _, budget = batch
    rows = packing.pack_rows(tokens, budget)
    assert_partition(rows, tokens, budget)
    assert all(len(row) for row in rows)
    lengths = [tokens[row].sum() for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    # No two rows that would fit into one: what any best-fit packing guarantees.
    assert len(rows) == 1 or lengths[-1] + lengths[-2] > budget
    bound = max(-(-tokens.sum() // budget), (2 * tokens > budget).sum())
    assert bound <= len(rows) <= 11 / 9 * max(bound, first_fit_decreasing(tokens, budget)) + 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7))
@settings(max_examples=60)
def test_rows_are_the_fewest_on_small_inputs(tokens):
    assert len(packing.pack_rows(tokens, 30)) == fewest_rows(tokens, 30)


def test_rows_beat_best_fit_where_it_fails():
    # Best-fit decreasing closes [6 5], [4 4], [3 2] on a budget of 12; [6 4 2] and [5 4 3] are enough.
    assert first_fit_decreasing([6, 5, 4, 4, 3, 2], 12) == 3
    assert as_lists([packing.pack_rows([6, 5, 4, 4, 3, 2], 12)]) == [[[0, 2, 5], [1, 3, 4]]]


def test_many_rows_are_full():
    # More groups than the subset search takes on: best fit alone has to be this good.
    tokens = np.clip(np.random.default_rng(7).lognormal(6.5, 0.8, 5000), 16, 4096).astype(np.int64)
    rows = packing.pack_rows(tokens, 4096)
    assert_partition(rows, tokens, 4096)
    assert len(rows) <= 1.003 * tokens.sum() / 4096 + 1


def test_ties_are_broken_by_index():
    assert as_lists([packing.pack_rows([4] * 7, 8)]) == [[[0, 1], [2, 3], [4, 5], [6]]]
    plan = as_lists(packing.pack_batch([4] * 8, [1.0] * 8, 8, 2))
    assert plan == as_lists(packing.pack_batch([4] * 8, [5.0] * 8, 8, 2))  # only ratios of costs count


@given(batches(), st.integers(1, 9))
def test_batch_is_a_partition_with_equal_rows_per_rank(batch, ranks):
    tokens, cost, budget = batch
    plan = packing.pack_batch(tokens, cost, budget, ranks)
    per_rank = len(plan[0])
    assert len(plan) == ranks and all(len(rows) == per_rank for rows in plan)
    rows = [row for own in plan for row in own]
    assert_partition(rows, tokens, budget)
    assert per_rank == -(-len(packing.pack_rows(tokens, budget)) // ranks)
    if len(tokens) >= ranks * per_rank:
        assert all(len(row) for row in rows)
    for own in plan:
        lengths = [tokens[row].sum() for row in own]
        assert lengths == sorted(lengths, reverse=True)


@given(batches(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_plans_depend_on_the_arguments_only(batch, ranks, random):
    tokens, cost, budget = batch
    first = as_lists(packing.pack_batch(tokens, cost, budget, ranks))
    packing.pack_rows(random.choices(range(1, 50), k=40), 64)  # other work in between leaves no trace
    assert as_lists(packing.pack_batch(tokens.astype(np.int32), cost.tolist(), budget, ranks)) == first
    # Costs in another unit: a power of two changes no bit of the ratios.
    assert as_lists(packing.pack_batch(tokens, cost * 2.0**-20, budget, ranks)) == first
    rows = [row.tolist() for row in packing.pack_rows(tokens, budget)]
    assert [row.tolist() for row in packing.pack_rows(np.repeat(tokens, 2)[::2], budget)] == rows


def test_threads_get_the_same_plan():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 500, 3000)
    want, got = as_lists(packing.pack_batch(tokens, tokens * 1.5, 2048, 8)), [None] * 4

    def work(i):
        got[i] = as_lists(packing.pack_batch(tokens, tokens * 1.5, 2048, 8))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want] * 4


def counted(prompt, responses, prefix_sharing):
    """Reference: (tokens, pairs) of one group, by writing the attention mask down."""
    if prefix_sharing:
        segments = [[-1] * prompt + [i for i, r in enumerate(responses) for _ in range(r)]]
    else:
        segments = [[i] * (prompt + r) for i, r in enumerate(responses)]
    pairs = sum(
        key <= query and row[key] in (row[query], -1)
        for row in segments
        for query in range(len(row))
        for key in range(len(row))
    )
    return sum(len(row) for row in segments), pairs


@given(ragged(), st.booleans(), st.floats(0, 1e3), st.floats(0, 1e3))
def test_cost_and_tokens_match_counted_masks(lengths, prefix_sharing, linear, attention):
    prompt, responses = lengths
    flat, offsets = flatten(responses)
    want = [counted(p, r, prefix_sharing) for p, r in zip(prompt, responses)]
    tokens = packing.group_tokens(prompt, flat, offsets, prefix_sharing=prefix_sharing)
    cost = packing.group_cost(
        prompt, flat, offsets, linear_cost=linear, attention_cost=attention, prefix_sharing=prefix_sharing
    )
    assert tokens.dtype == np.int64 and cost.dtype == np.float64
    assert tokens.tolist() == [t for t, _ in want]
    assert cost.tolist() == [linear * t + attention * p for t, p in want]


def test_cost_is_exact_at_real_lengths_and_finite_at_the_largest():
    rng = np.random.default_rng(5)
    prompt, response, offsets = rng.integers(1, 10**5, 50), rng.integers(1, 10**5, 400), np.arange(0, 401, 8)
    for sharing in (True, False):
        cost = packing.group_cost(prompt, response, offsets, linear_cost=0, attention_cost=1, prefix_sharing=sharing)
        for p, r, got in zip(prompt.tolist(), response.reshape(50, 8).tolist(), cost.tolist()):
            shared = p * (p + 1) // 2 + sum(x * p + x * (x + 1) // 2 for x in r)
            assert got == (shared if sharing else sum((p + x) * (p + x + 1) // 2 for x in r))
    huge = 2**31 - 1
    cost = packing.group_cost([huge], [huge], [0, 1], linear_cost=0, attention_cost=1, prefix_sharing=False)
    assert cost[0] == pytest.approx(huge * (2 * huge + 1), rel=1e-15)


@pytest.fixture(scope="module")
def real_lengths():
    """Prompts and the best and worst response of each source with two or more: sources[k] -> lengths of the top k."""
    if not DATA.exists():
        pytest.skip("the shared data set alpacaeval_fusion is not here")
    prompts, pairs = [], []
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        for line in lines:
            record, by_source = json.loads(line), {}
            for response in record["responses"]:
                by_source.setdefault(response["source"], []).append((response["reward"], len(response["text"])))
            best_first = sorted((sorted(r, reverse=True) for r in by_source.values() if len(r) > 1), reverse=True)
            prompts.append(len(record["prompt"]))
            pairs.append([[r[0][1], r[-1][1]] for r in best_first])

    def tokens_of(chars):
        return np.minimum(2048, np.asarray(chars) / CHARS_PER_TOKEN).astype(np.int64) + 1

    def lengths(sources):
        responses = [[x for pair in group[:sources] for x in pair] for group in pairs]
        flat, offsets = flatten(responses)
        return tokens_of(prompts), tokens_of(flat), offsets

    return lengths


@pytest.mark.parametrize("budget", [4096, 8192])
@pytest.mark.parametrize("sources", [1, 2, 4, 7])
def test_real_groups_fill_98_percent_of_the_rows(real_lengths, sources, budget):
    tokens = packing.group_tokens(*real_lengths(sources), prefix_sharing=True)
    budget = max(budget, tokens.max())  # the largest group forces more where there are many sources
    rows = packing.pack_rows(tokens, budget)
    assert_partition(rows, tokens, budget)
    fill = np.array([tokens[row].sum() for row in rows]) / budget
    assert fill[:-1].mean() >= 0.98
    assert len(rows) == -(-tokens.sum() // budget)  # no packing has fewer


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("ranks", [2, 8])
def test_real_batches_are_balanced(real_lengths, ranks, sharing):
    lengths = real_lengths(4)
    tokens = packing.group_tokens(*lengths, prefix_sharing=sharing)
    # An 1B model: attention is a tenth of the cost and makes long groups dearer than their tokens say.
    cost = packing.group_cost(*lengths, linear_cost=2.4e9, attention_cost=1.3e5, prefix_sharing=sharing)
    rng, budget = np.random.default_rng(11), int(tokens.max())
    for _ in range(10):
        batch = rng.choice(len(tokens), 128, replace=False)
        t, c = tokens[batch], cost[batch]
        plan = packing.pack_batch(t, c, budget, ranks)
        mean = c.sum() / ranks
        excess = max(sum(c[row].sum() for row in rows) for rows in plan) / mean - 1
        round_robin = max(c[k::ranks].sum() for k in range(ranks)) / mean - 1
        assert excess < min(0.01, round_robin + 1e-3)
        rows = ranks * len(plan[0])
        assert rows - ranks < -(-t.sum() // budget) + ranks
        # All rows are padded to the longest one: no more than 3 % above what the tokens or the largest group need.
        longest = max(t[row].sum() for own in plan for row in own)
        assert longest <= 1.03 * max(t.max(), t.sum() / rows)


def test_skewed_costs_are_balanced_and_a_dominant_group_stands_alone():
    rng = np.random.default_rng(2)
    cost = rng.pareto(1.5, 512) + 0.01
    tokens = np.minimum(1000, 1 + (100 * cost).astype(np.int64))
    plan = packing.pack_batch(tokens, cost, 4096, 4)  # rows 96 % full: swapping alone gets stuck here
    loads = np.array([sum(cost[row].sum() for row in rows) for rows in plan])
    assert loads.max() <= max(loads.mean(), cost.max()) * 1.01
    plan = packing.pack_batch([10] * 9, [100.0] + [1.0] * 8, 60, 3)
    assert [len(rows) for rows in plan] == [1, 1, 1]
    assert [0] in [rows[0].tolist() for rows in plan]


@pytest.mark.parametrize(
    ("seed", "groups", "ranks", "excess", "padding"),
    [
        (0, 100, 16, 0.01, 0.07),
        (2, 200, 16, 0.01, 0.07),
        (0, 200, 8, 0.01, 0.02),
        (2, 200, 8, 0.01, 0.03),
        (13, 200, 16, 0.06, 0.07),  # hardly a token to spare
    ],
)
def test_long_tails_are_balanced_in_short_rows(seed, groups, ranks, excess, padding):
    # A few rows a rank, lengths over three orders of magnitude, costs that grow faster than lengths.
    tokens = np.clip(np.random.default_rng(seed).lognormal(6, 0.8, groups), 10, 4000).astype(np.int64)
    cost = tokens * (1 + tokens / 2000)
    plan = packing.pack_batch(tokens, cost, 8192, ranks)
    loads = [sum(cost[row].sum() for row in rows) for rows in plan]
    longest = max(tokens[row].sum() for rows in plan for row in rows)
    assert max(loads) <= max(np.mean(loads), cost.max()) * (1 + excess)
    assert longest <= max(tokens.max(), tokens.sum() / (ranks * len(plan[0]))) * (1 + padding)


def test_costs_that_ignore_tokens_are_balanced_by_longer_rows():
    rng = np.random.default_rng(0)
    tokens, cost = rng.integers(50, 1500, 300), rng.pareto(1.5, 300) + 0.01
    loads = [sum(cost[row].sum() for row in rows) for rows in packing.pack_batch(tokens, cost, 8192, 4)]
    assert max(loads) <= max(np.mean(loads), cost.max()) * 1.05  # 1.19 with rows no longer than they must be


@pytest.mark.parametrize(
    ("tokens", "cost", "ranks"),
    [
        ([13, 6, 13, 16, 8, 10], [109, 5, 66, 55, 4, 3], 3),
        ([7, 18, 6, 5, 15], [2, 49, 126, 7, 454], 2),
        ([15, 15, 19, 19, 4, 3, 3, 15], [34, 6, 1, 244, 95, 1143, 1, 306], 2),
        ([18, 20, 3, 12, 16, 6], [3, 8, 4, 2, 176, 44], 3),
        ([7, 12, 20, 15, 7, 2, 4], [187, 207, 9, 16, 78, 58, 14], 3),
    ],
)
def test_balancing_leaves_no_row_empty(tokens, cost, ranks):
    # The cheapest plan would leave the rank of the dearest group with an empty row.
    plan = packing.pack_batch(tokens, cost, 20, ranks)
    assert len(tokens) >= ranks * len(plan[0])
    assert all(len(row) for rows in plan for row in rows)


def test_fewer_groups_than_rows_leaves_empty_rows():
    plan = as_lists(packing.pack_batch([5, 6, 7], [1.0, 1.0, 1.0], 8, 5))
    assert [len(rows) for rows in plan] == [1] * 5
    assert sorted(rows[0] for rows in plan) == [[], [], [0], [1], [2]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: packing.pack_rows([], 8), DataError, "no groups"),
        (lambda: packing.pack_rows([3, 9, 12], 8), DataError, "group 1 has 9 tokens.*budget of 8.*at least 12"),
        (lambda: packing.pack_rows([3, 0], 8), DataError, "group 1 has 0 tokens"),
        (lambda: packing.pack_rows([-3], 8), DataError, "group 0 has -3 tokens"),
        (lambda: packing.pack_rows([3], 0), ConfigError, "budget is 0"),
        (lambda: packing.pack_rows([3], -(2**70)), ConfigError, f"budget is -{2**70}"),
        (lambda: packing.pack_rows([3], 2**31), ConfigError, f"budget is {2**31}"),
        (lambda: packing.pack_rows([2.5], 8), DataError, "dtype float64"),
        (lambda: packing.pack_rows([[2, 3]], 8), DataError, "2 dimensions"),
        (lambda: packing.pack_batch([], [], 8, 2), DataError, "no groups"),
        (lambda: packing.pack_batch([9], [1.0], 8, 2), DataError, "group 0 has 9 tokens"),
        (lambda: packing.pack_batch([3, 4], [1.0, float("nan")], 8, 2), DataError, "cost of group 1 is nan"),
        (lambda: packing.pack_batch([3, 4], [float("inf"), 1.0], 8, 2), DataError, "cost of group 0 is inf"),
        (lambda: packing.pack_batch([3, 4], [1.0, -2.0], 8, 2), DataError, "cost of group 1 is -2"),
        (lambda: packing.pack_batch([3, 4], [1.0], 8, 2), DataError, "1 costs for 2 groups"),
        (lambda: packing.pack_batch([3], ["x"], 8, 2), DataError, "cost has dtype"),
        (lambda: packing.pack_batch([3], [1.0], 0, 2), ConfigError, "budget is 0"),
        (lambda: packing.pack_batch([3], [1.0], 8, 0), ConfigError, "ranks is 0"),
        (lambda: packing.pack_batch([3], [1.0], 8, 2**40), ConfigError, "ranks is"),
        (lambda: packing.group_tokens([1], [2], [0, 2], prefix_sharing=True), DataError, "offsets has 2 entries"),
        (lambda: packing.group_tokens([1], [2], [1], prefix_sharing=True), DataError, "offsets has 1 entries"),
        (lambda: packing.group_tokens([], [], [], prefix_sharing=True), DataError, "offsets has 0 entries"),
        (lambda: packing.group_tokens([1, 1], [2], [0, 3, 1], prefix_sharing=True), DataError, "falls from 3 to 1"),
        (lambda: packing.group_tokens([1], [-2], [0, 1], prefix_sharing=True), DataError, "response 0 has.*-2"),
        (lambda: packing.group_tokens([2**31], [2], [0, 1], prefix_sharing=True), DataError, "prompt 0 has"),
        (
            lambda: packing.group_cost([1], [2], [0, 1], linear_cost=-1, attention_cost=0, prefix_sharing=True),
            ConfigError,
            "linear_cost is -1",
        ),
        (
            lambda: packing.group_cost([1], [2], [0, 1], linear_cost=1, attention_cost=np.nan, prefix_sharing=True),
            ConfigError,
            "attention_cost is nan",
        ),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_budget_must_be_a_whole_number():
    with pytest.raises(TypeError):
        packing.pack_rows([3], 8.5)


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "megafuse.kernels._C", None)  # makes the import fail
    packing._extension.cache_clear()
    try:
        with pytest.raises(MegafuseError, match="pip install -e"):
            packing.pack_rows([1], 2)
    finally:
        packing._extension.cache_clear()
    monkeypatch.undo()
    assert importlib.import_module("megafuse.kernels._C").__doc__
