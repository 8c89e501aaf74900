"""Selection and terms against brute force on random prompts, and the rules one by one."""

import itertools
from collections import Counter

import numpy as np
import pytest

from megafuse.data.pairs import pair_terms, rewards_of, rloo_terms, sft_terms, wrpo_terms
from megafuse.data.records import Response
from megafuse.data.select import single_best, top1_per_source, top_k_all
from megafuse.data.weights import source_weights
from megafuse.errors import ConfigError, DataError


def random_responses(rng: np.random.Generator, n: int, *, graded: bool = False) -> list[Response]:
    """Few distinct rewards, so that ties are common."""
    return [
        Response(
            source="abcd"[rng.integers(4)],
            text=f"text {i}",
            reward=float(rng.integers(0, 6)) / 4,
            correct=bool(rng.integers(2)) if graded else None,
        )
        for i in range(n)
    ]


def make(*rows: tuple[str, float] | tuple[str, float, bool | None]) -> list[Response]:
    return [Response(r[0], f"t{i}", r[1], r[2] if len(r) > 2 else None) for i, r in enumerate(rows)]


def test_selection_against_sorting() -> None:
    rng = np.random.default_rng()
    for _ in range(200):
        responses = random_responses(rng, int(rng.integers(1, 12)))
        rewards, sources = [r.reward or 0.0 for r in responses], [r.source for r in responses]
        ranked = sorted(range(len(responses)), key=lambda i: (-rewards[i], i))
        for k in (1, 3, 99):
            assert top_k_all(rewards, k).tolist() == ranked[:k]
        per_source = [min((i for i in ranked if sources[i] == s), key=ranked.index) for s in set(sources)]
        assert top1_per_source(rewards, sources).tolist() == sorted(per_source, key=ranked.index)
        assert top1_per_source(rewards, sources, 2).tolist() == sorted(per_source, key=ranked.index)[:2]
        assert single_best(rewards).tolist() == ranked[:1]


def test_top_k_needs_k() -> None:
    with pytest.raises(ConfigError, match="k must be"):
        top_k_all([1.0], 0)


def test_sft_terms() -> None:
    responses = make(("a", 0.1), ("b", 0.3), ("a", 0.2), ("c", 0.3))
    terms = sft_terms(responses, k=3, alpha=0.05)
    assert terms.members == ((1,), (3,), (2,))
    np.testing.assert_array_equal(terms.weights, source_weights([0.3, 0.3, 0.2], 0.05))
    assert sft_terms(responses, selection="single_best").members == ((1,),)
    assert sft_terms(responses, selection="top1_per_source", k=None).members == ((1,), (3,), (2,))
    np.testing.assert_array_equal(sft_terms(responses, weighting="uniform").weights, [0.25] * 4)
    graded = make(("a", 0.9, False), ("a", 0.1, True), ("b", 0.5, None))
    terms = sft_terms(graded, use_correct=True)
    assert terms.members == ((1,),) and terms.dropped["not_correct"] == 2
    assert sft_terms(make(("a", 1.0, False)), use_correct=True).members == ()
    assert sft_terms(responses, use_correct=True).members == sft_terms(responses).members, "nothing is graded here"


@pytest.mark.parametrize("graded", [False, True])
def test_pairs_against_all_combinations(graded: bool) -> None:
    rng = np.random.default_rng()
    seen = Counter[str]()
    for _ in range(400):
        responses = random_responses(rng, int(rng.integers(1, 14)), graded=graded)
        low, high = sorted(rng.integers(0, 6, 2) / 4)
        alpha, k = float(rng.choice([1e-4, 1e-2, 1.0])), [None, 1, 2][rng.integers(3)]
        terms = pair_terms(responses, alpha=alpha, k=k, min_gap=low, max_gap=high, use_correct=graded)
        best: list[tuple[float, int, int]] = []
        for source in dict.fromkeys(r.source for r in responses):
            own = [i for i, r in enumerate(responses) if r.source == source]
            options = [
                (w, v)
                for w, v in itertools.permutations(own, 2)
                if not graded or (responses[w].correct and not responses[v].correct)
            ]
            if not options:
                continue
            w = max({p[0] for p in options}, key=lambda j: (responses[j].reward, -j))
            v = min({p[1] for p in options if p[0] == w}, key=lambda j: (responses[j].reward, j))
            gap = (responses[w].reward or 0) - (responses[v].reward or 0)
            if gap > 0 and low <= gap <= high:
                best.append((responses[w].reward or 0, w, v))
        best.sort(key=lambda t: -t[0])
        kept = best[:k]
        assert terms.members == tuple((w, v) for _, w, v in kept)
        sources = {r.source for r in responses}
        assert len(terms.members) + sum(terms.dropped.values()) == len(sources), "every source is kept or counted"
        if kept:
            np.testing.assert_array_equal(terms.weights, source_weights([r for r, _, _ in kept], alpha))
        seen.update(terms.dropped)
    wanted = {"one_response", "gap_too_small", "gap_too_large", "beyond_k"}
    assert wanted | ({"no_correct_response", "no_incorrect_response", "negative_gap"} if graded else {"tie"}) <= set(
        seen
    )


def test_pair_rules() -> None:
    assert pair_terms(make(("a", 1.0), ("a", 1.0), ("b", 2.0))).dropped == Counter(tie=1, one_response=1)
    same = [Response("a", "x", 1.0), Response("a", "x", 2.0)]
    assert pair_terms(same).dropped == Counter(same_text=1)
    huge = pair_terms(make(("a", 1.7e308), ("a", -1.7e308)))
    assert huge.members == ((0, 1),) and huge.weights.tolist() == [1.0]
    top1 = pair_terms(make(("a", 1.0), ("a", 0.0), ("b", 3.0), ("b", 2.5)), k=1)
    assert top1.members == ((2, 3),) and top1.weights.tolist() == [1.0] and top1.dropped == Counter(beyond_k=1)


def test_rloo_takes_whole_sources() -> None:
    responses = make(("a", 1.0), ("b", 5.0), ("a", 1.0), ("c", 2.0), ("c", 0.0), ("c", 1.0))
    terms = rloo_terms(responses, alpha=1.0)
    assert terms.members == ((3, 4, 5), (0, 2)) and terms.dropped == Counter(one_response=1)
    np.testing.assert_array_equal(terms.weights, source_weights([2.0, 1.0], 1.0))
    assert rloo_terms(responses, k=1).members == ((3, 4, 5),)


def test_wrpo_triples() -> None:
    responses = make(("me", 1.0), ("a", 5.0), ("me", 0.5), ("b", 6.0), ("me", 2.0))
    terms = wrpo_terms(responses, target_source="me")
    assert terms.members == ((3, 4, 2),) and terms.weights.tolist() == [1.0]
    assert wrpo_terms(responses[:2], target_source="me").dropped == Counter(target_one_response=1)
    assert wrpo_terms(make(("me", 1.0), ("me", 1.0), ("a", 0.0)), target_source="me").dropped == Counter(target_tie=1)
    assert wrpo_terms(make(("me", 1.0), ("me", 2.0)), target_source="me").dropped == Counter(no_other_source=1)


def test_unscored_responses_are_refused() -> None:
    with pytest.raises(DataError, match=r"'a' has no reward.*megafuse score"):
        rewards_of([Response("a", "text")])
