"""Selection and terms against brute force on random prompts, and the rules one by one."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.data.pairs import GroupTerms, pair_terms, rloo_terms, sft_terms, wrpo_terms
from megafuse.data.records import Response
from megafuse.data.select import Ties, rewards_of
from megafuse.data.weights import source_weights
from megafuse.errors import DataError
from megafuse.losses import ResponseSums, Terms, rloo
from megafuse.testing.ranking import best_and_worst, falling, sha

TIES = Ties("p", 0)


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


def as_rows(responses: Sequence[Response]) -> list[dict[str, Any]]:
    return [asdict(r) for r in responses]


def random_ties() -> Ties:
    return Ties(f"p{np.random.default_rng().integers(10**9)}", int(np.random.default_rng().integers(100)))


def cut(order: list[int], rewards: list[float], k: int) -> bool:
    """Whether a reward stands on both sides of the cut."""
    return bool({rewards[i] for i in order[:k]} & {rewards[i] for i in order[k:]})


def test_selection_against_sorting() -> None:
    rng = np.random.default_rng()
    tied = 0
    for _ in range(200):
        responses, ties = random_responses(rng, int(rng.integers(1, 12))), random_ties()
        rewards, sources = [r.reward or 0.0 for r in responses], [r.source for r in responses]
        order = falling(as_rows(responses), ties.prompt_id, ties.seed)
        per_source = [next(i for i in order if sources[i] == s) for s in set(sources)]
        per_source.sort(key=order.index)
        for k in (1, 3, 99):
            terms = sft_terms(responses, ties, k=k)
            assert terms.members == tuple((i,) for i in order[:k]) and terms.tied_at_k == cut(order, rewards, k)
            terms = sft_terms(responses, ties, selection="top1_per_source", k=k)
            assert terms.members == tuple((i,) for i in per_source[:k])
            assert terms.tied_at_k == cut(per_source, rewards, k)
            tied += bool(terms.tied_at_k)
        terms = sft_terms(responses, ties, selection="top1_per_source", k=None)
        assert terms.members == tuple((i,) for i in per_source) and terms.tied_at_k is None
        terms = sft_terms(responses, ties, selection="single_best")
        assert terms.members == ((order[0],),) and terms.tied_at_k == cut(order, rewards, 1)
        assert terms.candidates == Counter(sources)
    assert tied > 20


def test_sources_take_turns_inside_a_tie_only() -> None:
    """Of a, one is better; then a and b have two tied ones each: one of both is taken, though a has one already."""
    first = Counter[str]()
    for n in range(400):
        responses = make(("a", 1.0), ("a", 2.0), ("a", 1.0), ("b", 1.0), ("b", 1.0))
        order = [responses[i].source for (i,) in sft_terms(responses, Ties(f"p{n}", 0), k=None).members]
        assert order[0] == "a" and sorted(order[1:3]) == sorted(order[3:]) == ["a", "b"] and order[1:3] == order[3:]
        first[order[1]] += 1
    assert abs(first["a"] - 200) < 5 * 10, "a fair coin, 400 times"


def makers(responses: list[Response], ties: Ties) -> list[GroupTerms]:
    return [
        *(sft_terms(responses, ties, selection=s, k=2) for s in ("top_k_all", "top1_per_source", "single_best")),
        sft_terms(responses, ties, use_correct=True),
        pair_terms(responses, ties, k=2),
        pair_terms(responses, ties, use_correct=True),
        rloo_terms(responses, ties, k=2),
        wrpo_terms(responses, ties, target_source="a"),
    ]


def test_the_order_of_the_responses_does_not_matter() -> None:
    rng = np.random.default_rng()
    moved = 0
    for _ in range(300):
        responses, ties = random_responses(rng, int(rng.integers(2, 14)), graded=True), random_ties()
        turned = [responses[i] for i in rng.permutation(len(responses))]
        for n, (one, two) in enumerate(zip(makers(responses, ties), makers(turned, ties))):
            told = [
                [[(r := given[i]).source, r.text, r.reward] for i in members]
                for given, terms in ((responses, one), (turned, two))
                for members in terms.members
            ]
            half = len(told) // 2
            if n == 6:  # RLOO's term is the whole source, in the order of the file
                told = [sorted(term) for term in told]
            assert told[:half] == told[half:] and one.weights.tobytes() == two.weights.tobytes()
            assert (one.dropped_of, one.candidates, one.tied_at_k) == (two.dropped_of, two.candidates, two.tied_at_k)
            moved += one.members != two.members
    assert moved > 100


def test_every_part_of_a_response_can_decide() -> None:
    """Responses that differ in one field alone: which is first does not hang on the place, and is a fair coin."""
    for field, values in {
        "text": ("x", "y"), "model": ("m", None), "finish_reason": ("stop", None), "correct": (True, None)
    }.items():  # fmt: skip
        firsts = 0
        for n in range(400):
            two = [replace(Response("a", "t", 1.0), **{field: value}) for value in values]
            chosen = [given[sft_terms(given, Ties(f"p{n}", 1), k=1).members[0][0]] for given in (two, two[::-1])]
            assert chosen[0] == chosen[1], field
            firsts += chosen[0] == two[0]
        assert abs(firsts - 200) < 5 * 10, field


def test_sft_terms() -> None:
    responses = make(("a", 0.1), ("b", 0.3), ("a", 0.2), ("c", 0.3))
    terms = sft_terms(responses, TIES, k=3, alpha=0.05)
    assert sorted(terms.members[:2]) == [(1,), (3,)] and terms.members[2:] == ((2,),)
    np.testing.assert_array_equal(terms.weights, source_weights([0.3, 0.3, 0.2], 0.05))
    assert sft_terms(responses, TIES, selection="single_best").members == terms.members[:1]
    assert sft_terms(responses, TIES, selection="top1_per_source", k=None).members == terms.members
    np.testing.assert_array_equal(sft_terms(responses, TIES, weighting="uniform").weights, [0.25] * 4)
    graded = make(("a", 0.9, False), ("a", 0.1, True), ("b", 0.5, None))
    terms = sft_terms(graded, TIES, use_correct=True)
    assert terms.members == ((1,),) and terms.dropped["not_correct"] == 2
    assert sft_terms(make(("a", 1.0, False)), TIES, use_correct=True).members == ()
    assert sft_terms(responses, TIES, use_correct=True).members == sft_terms(responses, TIES).members, (
        "nothing is graded here"
    )


@pytest.mark.parametrize("graded", [False, True])
def test_pairs_against_all_combinations(graded: bool) -> None:
    rng = np.random.default_rng()
    seen = Counter[str]()
    for _ in range(400):
        responses = random_responses(rng, int(rng.integers(1, 14)), graded=graded)
        low, high = sorted(rng.integers(0, 6, 2) / 4)
        alpha, k = float(rng.choice([1e-4, 1e-2, 1.0])), [None, 1, 2][rng.integers(3)]
        ties = random_ties()
        terms = pair_terms(responses, ties, alpha=alpha, k=k, min_gap=low, max_gap=high, use_correct=graded)
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
            won, lost = (sorted({p[side] for p in options}) for side in (0, 1))
            w = won[best_and_worst(as_rows([responses[j] for j in won]), ties.prompt_id, ties.seed)[0]]
            v = lost[best_and_worst(as_rows([responses[j] for j in lost]), ties.prompt_id, ties.seed)[1]]
            gap = (responses[w].reward or 0) - (responses[v].reward or 0)
            if gap > 0 and low <= gap <= high:
                best.append((responses[w].reward or 0, w, v))
        best.sort(key=lambda t: (-t[0], sha(ties.seed, ties.prompt_id, responses[t[1]].source)))
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
    assert pair_terms(make(("a", 1.0), ("a", 1.0), ("b", 2.0)), TIES).dropped == Counter(tie=1, one_response=1)
    same = [Response("a", "x", 1.0), Response("a", "x", 2.0)]
    assert pair_terms(same, TIES).dropped == Counter(same_text=1)
    huge = pair_terms(make(("a", 1.7e308), ("a", -1.7e308)), TIES)
    assert huge.members == ((0, 1),) and huge.weights.tolist() == [1.0]
    top1 = pair_terms(make(("a", 1.0), ("a", 0.0), ("b", 3.0), ("b", 2.5)), TIES, k=1)
    assert top1.members == ((2, 3),) and top1.weights.tolist() == [1.0] and top1.dropped == Counter(beyond_k=1)


def test_rloo_takes_whole_sources() -> None:
    responses = make(("a", 1.0), ("b", 5.0), ("a", 1.0), ("c", 2.0), ("c", 0.0), ("c", 1.0))
    terms = rloo_terms(responses, TIES, alpha=1.0)
    assert terms.members == ((3, 4, 5), (0, 2)) and terms.dropped == Counter(one_response=1)
    np.testing.assert_array_equal(terms.weights, source_weights([2.0, 1.0], 1.0))
    assert rloo_terms(responses, TIES, k=1).members == ((3, 4, 5),)


def test_wrpo_triples() -> None:
    responses = make(("me", 1.0), ("a", 5.0), ("me", 0.5), ("b", 6.0), ("me", 2.0))
    terms = wrpo_terms(responses, TIES, target_source="me")
    assert terms.members == ((3, 4, 2),) and terms.weights.tolist() == [1.0]
    assert wrpo_terms(responses[:2], TIES, target_source="me").dropped == Counter(target_one_response=1)
    assert wrpo_terms(make(("me", 1.0), ("me", 1.0), ("a", 0.0)), TIES, target_source="me").dropped == Counter(
        target_tie=1
    )
    assert wrpo_terms(make(("me", 1.0), ("me", 2.0)), TIES, target_source="me").dropped == Counter(no_other_source=1)


def test_unscored_responses_are_refused() -> None:
    with pytest.raises(DataError, match=r"'a' has no reward.*megafuse score"):
        rewards_of([Response("a", "text")])


def tokens_of(*texts: str) -> list[np.ndarray]:
    return [np.array([ord(c) for c in text], np.int32) for text in texts]


def test_pairs_of_equal_tokens_are_dropped() -> None:
    """Two texts that are cut to one: the other source has the whole weight. Equal lengths are not equal tokens."""
    responses = make(("a", 1.0), ("a", 0.0), ("b", 0.9), ("b", 0.0))
    equal, unequal = tokens_of("xy", "xy", "z", "w"), tokens_of("xy", "xz", "xy", "xyz")
    terms = pair_terms(responses, TIES, equal, alpha=1.0)
    assert terms.members == ((2, 3),) and terms.weights.tolist() == [1.0]
    assert terms.dropped == Counter(same_tokens=1) and terms.dropped_of == Counter({("a", "same_tokens"): 1})
    assert pair_terms(responses, TIES, unequal).members == ((0, 1), (2, 3))
    same = [replace(r, text="t") for r in responses]
    assert pair_terms(same, TIES, unequal).dropped == Counter(), "what is trained on decides, not the text"
    assert pair_terms(same, TIES).dropped == Counter(same_text=2)


def test_rloo_of_equal_tokens_and_of_equal_rewards() -> None:
    responses = make(("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 1.0), ("c", 1.0), ("c", 0.0), ("c", 0.0))
    terms = rloo_terms(responses, TIES, tokens_of("x", "x", "y", "z", "v", "v", "w"))
    assert sorted(terms.members) == [(2, 3), (4, 5, 6)] and terms.weights.tolist() == [0.5, 0.5]
    assert terms.dropped_of == Counter({("a", "same_tokens"): 1})
    assert terms.noted_of == Counter({("b", "equal_rewards"): 1})
    best = rloo_terms(make(("a", 2.0), ("a", 0.0), ("b", 1.0), ("b", 1.0)), TIES, k=1)
    assert best.noted_of == Counter(), "what is not kept is not told of"


@pytest.mark.parametrize("surrogate", ["reinforce", "clipped_ratio"])
@pytest.mark.parametrize("equal_tokens", [True, False])
def test_rloo_learns_nothing_from_equal_tokens(surrogate: str, equal_tokens: bool) -> None:
    """Why such a source has no term: one log-prob, advantages that sum to zero. Both inside the clip range."""
    own = torch.tensor([-2.0, -3.0], dtype=torch.float64, requires_grad=True)
    logps = own[0].expand(2) if equal_tokens else own
    sums = ResponseSums(logps, torch.tensor([4, 4]), torch.tensor([1.0, 0.0]), logps.detach() - 0.05)
    terms = Terms(torch.tensor([[0, 1]]), torch.ones(1), torch.zeros(1, dtype=torch.int64), 1)
    rloo(sums, terms, beta_kl=0.1, surrogate=surrogate)[0].sum().backward()
    assert own.grad is not None and bool((own.grad.abs() < 1e-12).all()) == equal_tokens


def test_wrpo_of_equal_tokens() -> None:
    responses = make(("me", 1.0), ("a", 5.0), ("me", 0.5))
    terms = wrpo_terms(responses, TIES, tokens_of("x", "y", "x"), target_source="me")
    assert terms.members == () and terms.dropped == Counter(target_same_tokens=1)
    terms = wrpo_terms(responses, TIES, tokens_of("x", "z", "z"), target_source="me")
    assert terms.members == ((1, 0, 2),) and terms.noted_of == Counter({("a", "same_as_rejected"): 1})
    terms = wrpo_terms(responses, TIES, tokens_of("x", "x", "z"), target_source="me")
    assert terms.members == ((1, 0, 2),) and terms.noted_of == Counter()
