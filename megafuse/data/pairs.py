"""The loss terms of one prompt: weighted responses (FuseSFT), pairs, leave-one-out groups and WRPO triples (FusePO).

Pairs are built INSIDE a source: chosen is its highest reward, rejected its lowest. Filters run first, then the `k`
sources with the highest reward of their chosen response are kept, and the weights are Eq. 8 over the kept ones.
Terms come in descending reward of the response that their weight is made of; ties keep the order of the file.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

import numpy as np

from megafuse.data.records import Response
from megafuse.data.select import by_reward, single_best, top1_per_source, top_k_all
from megafuse.data.weights import source_weights
from megafuse.errors import DataError

Weighting = Literal["softmax", "uniform"]


@dataclass(frozen=True)
class GroupTerms:
    """The terms of one prompt: which responses each involves, its weight, and what was left out and why."""

    members: tuple[tuple[int, ...], ...]  # indices into the responses given
    weights: np.ndarray  # [m] float64, sums to 1; [0] where nothing is left
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> number of sources (or of prompts, for WRPO)
    dropped_of: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, reason) -> the same numbers


def rewards_of(responses: Sequence[Response]) -> np.ndarray:
    """Rewards as a vector. [n] float64.

    Raises:
        DataError: a response has no reward.
    """
    for response in responses:
        if response.reward is None:
            raise DataError(f"a response of source {response.source!r} has no reward: run `megafuse score` first")
    return np.array([r.reward for r in responses], dtype=np.float64)


def _weigh(
    responses: Sequence[Response],
    terms: Iterable[tuple[float, tuple[int, ...]]],
    alpha: float,
    k: int | None,
    weighting: Weighting,
    dropped: Counter[tuple[str, str]],
) -> GroupTerms:
    """Keep the k terms of the highest reward and weigh them."""
    ranked = list(terms)
    ranks = by_reward([reward for reward, _ in ranked]) if ranked else np.zeros(0, dtype=np.int64)
    order = ranks[:k]
    for i in ranks[len(order) :]:
        dropped[responses[ranked[i][1][0]].source, "beyond_k"] += 1
    reasons: Counter[str] = Counter()
    for (_, reason), number in dropped.items():
        reasons[reason] += number
    if not len(order):
        return GroupTerms((), np.zeros(0), reasons, dropped)
    if weighting == "softmax":
        weights = source_weights([ranked[i][0] for i in order], alpha)
    else:
        weights = np.full(len(order), 1.0 / len(order))
    return GroupTerms(tuple(ranked[i][1] for i in order), weights, reasons, dropped)


def _by_source(responses: Sequence[Response]) -> dict[str, list[int]]:
    sources: dict[str, list[int]] = {}
    for i, response in enumerate(responses):
        sources.setdefault(response.source, []).append(i)
    return sources


def _graded(responses: Sequence[Response], use_correct: bool) -> bool:
    """Whether the correctness rule applies: it is asked for, and the prompt has graded answers (math, coding)."""
    return use_correct and any(r.correct is not None for r in responses)


def sft_terms(
    responses: Sequence[Response],
    *,
    selection: Literal["top_k_all", "top1_per_source", "single_best"] = "top_k_all",
    k: int | None = 4,
    alpha: float = 1e-2,
    weighting: Weighting = "softmax",
    use_correct: bool = False,
) -> GroupTerms:
    """One term `[i]` a selected response, weights Eq. 8 over the selected ones (Eq. 10).

    With `use_correct`, prompts that have graded responses keep the correct ones only (FuseChat-3.0's table).
    """
    kept = list(range(len(responses)))
    dropped: Counter[tuple[str, str]] = Counter()
    if _graded(responses, use_correct):
        kept = [i for i in kept if responses[i].correct]
        dropped.update((r.source, "not_correct") for r in responses if not r.correct)
    if not kept:
        return _weigh(responses, [], alpha, None, weighting, dropped)
    rewards = rewards_of([responses[i] for i in kept])
    if selection == "top_k_all":
        chosen = top_k_all(rewards, k if k is not None else len(kept))
    elif selection == "top1_per_source":
        chosen = top1_per_source(rewards, [responses[i].source for i in kept], k)
    else:
        chosen = single_best(rewards)
    return _weigh(responses, [(float(rewards[j]), (kept[j],)) for j in chosen], alpha, None, weighting, dropped)


def _decimal(number: float) -> Decimal:
    """The shortest decimal that reads back as `number`: what stands in the file."""
    return Decimal(repr(float(number)))


def _pair(
    responses: Sequence[Response], indices: list[int], min_gap: float | None, max_gap: float | None, graded: bool
) -> tuple[int, int] | str:
    """(chosen, rejected) of one source, or the reason why it has no pair."""
    if len(indices) < 2:
        return "one_response"
    high, low = indices, indices
    if graded:
        high = [i for i in indices if responses[i].correct is True]
        low = [i for i in indices if responses[i].correct is False]
        if not high or not low:
            return "no_correct_response" if not high else "no_incorrect_response"
    chosen = high[int(np.argmax(rewards_of([responses[i] for i in high])))]
    rejected = low[int(np.argmin(rewards_of([responses[i] for i in low])))]
    best, worst = rewards_of([responses[chosen], responses[rejected]])
    if best == worst:
        return "tie"
    if best < worst:  # only with grades: the reward model prefers the wrong answer
        return "negative_gap"
    # The bounds are inclusive for the numbers as they are written: in float64, 0.15 - 0.05 is below 0.1.
    gap = _decimal(best) - _decimal(worst)
    if min_gap is not None and gap < _decimal(min_gap):
        return "gap_too_small"
    if max_gap is not None and gap > _decimal(max_gap):
        return "gap_too_large"
    # the same words under two rewards: the loss would be constant
    return "same_text" if responses[chosen].text == responses[rejected].text else (chosen, rejected)


def pair_terms(
    responses: Sequence[Response],
    *,
    alpha: float = 5e-3,
    k: int | None = None,
    min_gap: float | None = None,
    max_gap: float | None = None,
    weighting: Weighting = "softmax",
    use_correct: bool = False,
) -> GroupTerms:
    """One term `[chosen, rejected]` a source (Eq. 11). `k=1` is the SFT+PO baseline: one pair a prompt, weight 1.

    Sources with one response, a tie, the same text twice, or a gap outside `min_gap <= gap <= max_gap` (of the decimals
    that the file holds, both bounds inside) have no pair and are counted in `dropped`. With `use_correct`, prompts that
    have graded responses pair the best correct one with the worst incorrect one of a source (FuseChat-3.0's table).
    """
    dropped: Counter[tuple[str, str]] = Counter()
    terms: list[tuple[float, tuple[int, ...]]] = []
    graded = _graded(responses, use_correct)
    for source, indices in _by_source(responses).items():
        pair = _pair(responses, indices, min_gap, max_gap, graded)
        if isinstance(pair, str):
            dropped[source, pair] += 1
        else:
            terms.append((float(rewards_of([responses[pair[0]]])[0]), pair))
    return _weigh(responses, terms, alpha, k, weighting, dropped)


def rloo_terms(
    responses: Sequence[Response], *, alpha: float = 5e-3, k: int | None = None, weighting: Weighting = "softmax"
) -> GroupTerms:
    """One term with all responses of a source, for sources that have at least two; weighed by their best reward."""
    dropped: Counter[tuple[str, str]] = Counter()
    terms: list[tuple[float, tuple[int, ...]]] = []
    for source, indices in _by_source(responses).items():
        if len(indices) < 2:
            dropped[source, "one_response"] += 1
        else:
            terms.append((float(rewards_of([responses[i] for i in indices]).max()), tuple(indices)))
    return _weigh(responses, terms, alpha, k, weighting, dropped)


def wrpo_terms(responses: Sequence[Response], *, target_source: str) -> GroupTerms:
    """One term `[best source response, target's own best, target's own worst]`, weight 1 (WRPO, arXiv 2412.03187).

    A prompt has none where no other source answered, the target has fewer than two responses, or its two are a tie.
    """
    own = [i for i, r in enumerate(responses) if r.source == target_source]
    others = [i for i, r in enumerate(responses) if r.source != target_source]
    if not others:
        return GroupTerms((), np.zeros(0), Counter(no_other_source=1))
    pair = _pair(responses, own, None, None, graded=False)
    if isinstance(pair, str):
        return GroupTerms((), np.zeros(0), Counter({f"target_{pair}": 1}))
    best = others[int(np.argmax(rewards_of([responses[i] for i in others])))]
    return GroupTerms(((best, *pair),), np.ones(1))
