import hashlib
import json
import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from megafuse.errors import DataError, IntegrityError
from megafuse.evals.rank_accuracy import rank_accuracy


@dataclass(frozen=True)
class Prompt:
    sources: tuple[str, ...]
    rewards: np.ndarray
    prompt_id: str = "p"
    responses: tuple[np.ndarray, ...] = ()


def prompt(sources: str, *rewards: float, prompt_id: str = "p") -> Prompt:
    responses = tuple(np.array([i, 7], np.int32) for i in range(len(sources)))
    return Prompt(tuple(sources), np.array(rewards, dtype=np.float64), prompt_id, responses)


Candidate = tuple[float, Fraction, str]  # reward, score, what decides between equal rewards: the lowest counts


def pair(responses: list[Candidate]) -> tuple[Fraction, Fraction] | str:
    """(score of the best, score of the worst), or why there is no pair."""
    if len(responses) < 2:
        return "single"
    best = min(responses, key=lambda r: (-r[0], r[2]))
    worst = min(responses, key=lambda r: (r[0], r[2]))
    return "equal" if best[0] == worst[0] else (best[1], worst[1])


def sha(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([0, *parts]).encode()).hexdigest()


def expected(found: list[tuple[Fraction, Fraction] | str]) -> dict[str, Any]:
    pairs = [p for p in found if not isinstance(p, str)]
    points = [Fraction(1) if b > w else Fraction(1, 2) if b == w else Fraction(0) for b, w in pairs]
    n = len(pairs)
    p = sum(points, Fraction(0)) / n if n else None
    return {
        "pairs": n,
        "correct": float(sum(points, Fraction(0))),
        "score_ties": sum(b == w for b, w in pairs),
        "skipped_equal_rewards": found.count("equal"),
        "skipped_single": found.count("single"),
        "accuracy": None if p is None else float(p),
        "standard_error": None if p is None else math.sqrt(p * (1 - p) / n),
        "best_logp": float(sum(b for b, _ in pairs) / n) if n else None,
        "worst_logp": float(sum(w for _, w in pairs) / n) if n else None,
        "margin": float(sum(b - w for b, w in pairs) / n) if n else None,
    }


def brute_force(groups: list[Prompt], logps: list[int], lengths: list[int]) -> dict[str, Any]:
    """Plain loops over exact fractions."""
    scores = [Fraction(a, b) for a, b in zip(logps, lengths)]
    names = sorted({s for g in groups for s in g.sources})
    intra: dict[str, list[Any]] = {name: [] for name in names}
    cross = []
    for group in groups:
        own, scores = scores[: len(group.sources)], scores[len(group.sources) :]
        seen: dict[str, list[Candidate]] = {}
        for source, reward, score, ids in zip(group.sources, group.rewards.tolist(), own, group.responses):
            seen.setdefault(source, []).append((reward, score, sha(group.prompt_id, source, ids.tobytes().hex())))
        for source, responses in seen.items():
            intra[source].append(pair(responses))
        cross.append(pair([(*responses[0][:2], sha(group.prompt_id, source)) for source, responses in seen.items()]))
    assert not scores
    per_source = {name: expected(intra[name]) for name in names}
    counted = [s for s in per_source.values() if s["accuracy"] is not None]
    k = len(counted)
    return {
        "groups": len(groups),
        "responses": len(logps),
        "intra": sum(s["accuracy"] for s in counted) / k if k else None,
        "intra_standard_error": sum(s["standard_error"] ** 2 for s in counted) ** 0.5 / k if k else None,
        "cross": expected(cross),
        "intra_pooled": expected([p for name in names for p in intra[name]]),
        "per_source": per_source,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    return a is b if b is None else a == pytest.approx(b, rel=1e-12, abs=1e-12)


def test_against_brute_force_on_random_data() -> None:
    """Few distinct rewards, log-probs and lengths, so that ties of both kinds, singles and absent sources all occur."""
    rng = np.random.default_rng()
    ties = equal = single = 0
    for _ in range(200):
        groups, logps, lengths = [], [], []
        for _ in range(rng.integers(0, 12)):
            n = int(rng.integers(1, 9))
            # integer rewards and power-of-two lengths: quotients are exact, so ties are ties in both
            name = f"p{rng.integers(10**6)}"
            groups.append(prompt("".join(rng.choice(list("cab"), n)), *rng.integers(0, 4, n), prompt_id=name))
            logps += (-rng.integers(1, 9, n)).tolist()
            lengths += (2 ** rng.integers(0, 3, n)).tolist()
        result = rank_accuracy(groups, np.array(logps, dtype=np.float64), np.array(lengths, dtype=np.int64)).to_json()
        assert same(json.loads(json.dumps(result, allow_nan=False)), brute_force(groups, logps, lengths))
        ties += result["cross"]["score_ties"] + result["intra_pooled"]["score_ties"]
        equal += result["cross"]["skipped_equal_rewards"] + result["intra_pooled"]["skipped_equal_rewards"]
        single += result["cross"]["skipped_single"] + result["intra_pooled"]["skipped_single"]
    assert min(ties, equal, single) > 20


def test_by_hand() -> None:
    groups = [prompt("aabb", 1.0, 0.0, 0.0, 1.0), prompt("aab", 0.0, 2.0, 1.0)]
    logps = np.array([-10.0, -30.0, -10.0, -5.0, -8.0, -9.0, -1.0])
    lengths = np.array([10, 20, 10, 10, 8, 3, 1])
    # a: -1.0 vs -1.5 right; -3.0 vs -1.0 wrong.  b: -0.5 vs -1.0 right; second prompt has one response of b.
    # cross, first responses: a -1.0 (reward 1) vs b -1.0 (reward 0), a tie; a -1.0 (0) vs b -1.0 (1), a tie.
    result = rank_accuracy(groups, logps, lengths)
    assert result.per_source["a"].accuracy == 0.5 and result.per_source["b"].accuracy == 1.0
    assert result.intra == 0.75 and result.intra_pooled.accuracy == pytest.approx(2 / 3)
    assert result.cross.accuracy == 0.5 and result.cross.score_ties == 2
    assert result.per_source["a"].best_logp == -2.0 and result.per_source["a"].margin == -0.75
    assert result.per_source["b"].skipped_single == 1


def test_no_source_is_preferred_for_where_it_stands() -> None:
    """Rewards 1, 1, 0 of sources a, b, c: whether a or b is the best one is a fair coin, whoever comes first."""
    groups = [prompt("abc", 1.0, 1.0, 0.0, prompt_id=f"p{i}") for i in range(2000)]
    logps, lengths = np.tile([-1.0, -3.0, -2.0], 2000), np.ones(6000)  # right with a, wrong with b
    found = rank_accuracy(groups, logps, lengths).cross
    assert abs(found.correct - 1000) < 5 * math.sqrt(2000 * 0.25), found.correct
    turned = [Prompt(("b", "c", "a"), np.array([1.0, 0.0, 1.0]), g.prompt_id, g.responses) for g in groups]
    assert rank_accuracy(turned, np.tile([-3.0, -2.0, -1.0], 2000), lengths).cross == found


def test_the_order_of_a_source_s_responses_does_not_matter() -> None:
    rng = random.Random()
    groups = [prompt("a" * 6, *rng.choices((0.0, 1.0, 2.0), k=6), prompt_id=f"p{i}") for i in range(200)]
    logps = np.array([rng.random() for _ in range(1200)])
    orders = [rng.sample(range(6), 6) for _ in groups]
    turned = [
        replace(g, rewards=g.rewards[order], responses=tuple(g.responses[i] for i in order))
        for g, order in zip(groups, orders)
    ]
    there = np.concatenate([logps[6 * n : 6 * n + 6][order] for n, order in enumerate(orders)])
    one, two = (rank_accuracy(g, x, np.ones(1200)).per_source["a"] for g, x in ((groups, logps), (turned, there)))
    assert one == two and one.pairs > 100


def test_the_score_is_the_mean_not_the_sum() -> None:
    result = rank_accuracy([prompt("aa", 1.0, 0.0)], np.array([-100.0, -10.0]), np.array([1000, 10]))
    assert result.intra == 1.0


def test_a_perfect_and_an_inverted_model() -> None:
    rng = np.random.default_rng()
    groups = [prompt("aaabbbccc", *rng.standard_normal(9)) for _ in range(50)]
    rewards = np.concatenate([g.rewards for g in groups])
    lengths = rng.integers(1, 500, len(rewards))
    good, bad = (rank_accuracy(groups, sign * rewards * lengths, lengths) for sign in (1, -1))
    assert good.intra == good.cross.accuracy == good.intra_pooled.accuracy == 1.0 and good.intra_standard_error == 0.0
    assert bad.intra == bad.cross.accuracy == 0.0 and good.cross.margin is not None and good.cross.margin > 0
    coin = rank_accuracy(groups, np.full(len(rewards), -1.0), np.ones(len(rewards)))
    assert coin.intra == 0.5 and coin.cross.score_ties == 50


@pytest.mark.parametrize(
    ("groups", "logps", "lengths", "error", "message"),
    [
        ([prompt("aa", 1, 0)], [-1.0], [1], IntegrityError, "1 log-probs do not fit .* first 1 groups have 2"),
        ([prompt("aa", 1, 0)], [-1.0] * 3, [1] * 3, IntegrityError, "3 log-probs do not fit .* first 1 groups have 2"),
        ([prompt("aa", 1, 0)], [-1.0] * 2, [1] * 3, IntegrityError, "equally long"),
        ([prompt("aa", 1, float("nan"))], [-1.0] * 2, [1] * 2, DataError, "'p' has a reward that is not finite"),
        ([prompt("aa", 1)], [-1.0] * 2, [1] * 2, DataError, "2 responses and 1 rewards"),
        ([prompt("aa", 1, 0)], [-1.0, float("nan")], [1] * 2, IntegrityError, "log-prob that is not finite"),
        ([prompt("aa", 1, 0)], [-1.0] * 2, [1, 0], DataError, "response of 0 tokens"),
    ],
)
def test_refusals(groups: list[Prompt], logps: list[float], lengths: list[int], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        rank_accuracy(groups, np.array(logps), np.array(lengths))
