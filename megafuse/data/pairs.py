"""The loss terms of one prompt: weighted responses (FuseSFT), pairs, leave-one-out groups and WRPO triples (FusePO).

Pairs are built INSIDE a source: chosen is its highest reward, rejected its lowest. Filters run first, then the `k`
sources with the highest reward of their chosen response are kept, and the weights are Eq. 8 over the kept ones.
Terms come in descending reward of the response that their weight is made of, equal ones as `data.select` says: nothing
depends on the order of the responses.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal

import numpy as np

from megafuse.data.records import Response
from megafuse.data.select import Ties, best_and_worst, cuts_a_tie, first_of_sources, ranked, rewards_of
from megafuse.data.weights import source_weights

TOP_K = 4  # responses that FuseSFT takes of a prompt (FuseRL, Appendix J)
Weighting = Literal["softmax", "uniform"]
Tokens = Sequence[np.ndarray] | None  # [R_i] int32 a response, as training sees it; None: not tokenised, texts compare


@dataclass(frozen=True)
class GroupTerms:
    """The terms of one prompt: which responses each involves, its weight, and what was left out and why."""

    members: tuple[tuple[int, ...], ...]  # indices into the responses given
    weights: np.ndarray  # [m] float64, sums to 1; [0] where nothing is left
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> number of sources (or of prompts, for WRPO)
    dropped_of: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, reason) -> the same numbers
    noted_of: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, what) -> terms that are kept
    candidates: Counter[str] = field(default_factory=Counter)  # source -> responses that were chosen among
    tied_at_k: bool | None = None  # the last one kept has the reward of one left out; None: nothing is cut at a number


def _weigh(
    responses: Sequence[Response],
    terms: Sequence[tuple[float, tuple[int, ...]]],
    alpha: float,
    k: int | None,
    weighting: Weighting,
    dropped: Counter[tuple[str, str]],
) -> GroupTerms:
    """Keep the first k of the terms (reward, members), which come in falling reward, and weigh them."""
    kept, rest = terms[:k], terms[k:] if k is not None else ()
    for _, members in rest:
        dropped[responses[members[0]].source, "beyond_k"] += 1
    reasons: Counter[str] = Counter()
    for (_, reason), number in dropped.items():
        reasons[reason] += number
    if not kept:
        weights = np.zeros(0)
    elif weighting == "softmax":
        weights = source_weights([reward for reward, _ in kept], alpha)
    else:
        weights = np.full(len(kept), 1.0 / len(kept))
    return GroupTerms(
        members=tuple(members for _, members in kept),
        weights=weights,
        dropped=reasons,
        dropped_of=dropped,
        candidates=Counter(r.source for r in responses),
        tied_at_k=cuts_a_tie([reward for reward, _ in terms], k),
    )


def _falling(
    responses: Sequence[Response], ties: Ties, terms: Sequence[tuple[float, tuple[int, ...]]]
) -> list[tuple[float, tuple[int, ...]]]:
    """The terms, one a source, in falling reward; those of equal reward in the order of their sources' hashes."""
    return sorted(terms, key=lambda term: (-term[0], ties.source(responses[term[1][0]].source)))


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
    ties: Ties,
    *,
    selection: Literal["top_k_all", "top1_per_source", "single_best"] = "top_k_all",
    k: int | None = TOP_K,
    alpha: float = 1e-2,
    weighting: Weighting = "softmax",
    use_correct: bool = False,
) -> GroupTerms:
    """One term `[i]` a selected response, weights Eq. 8 over the selected ones (Eq. 10).

    Selection (FuseRL, Appendix J): `top_k_all`, the `k` highest-reward responses over all sources; `top1_per_source`,
    the best response of every source, or of the `k` sources whose best response has the highest reward; `single_best`,
    the one best response, the plain SFT baseline. Equal rewards, here and in the order of the terms: sources in turn,
    by hash (`data.select`). With `use_correct`, prompts that have graded responses keep the correct ones only
    (FuseChat-3.0's table).

    Raises:
        DataError: a response has no reward.
    """
    kept = list(range(len(responses)))
    dropped: Counter[tuple[str, str]] = Counter()
    if _graded(responses, use_correct):
        kept = [i for i in kept if responses[i].correct]
        dropped.update((r.source, "not_correct") for r in responses if not r.correct)
    order = ranked(responses, ties, kept)
    if selection == "top1_per_source":
        order = first_of_sources(responses, order)
    limit = 1 if selection == "single_best" else k
    rewards = rewards_of([responses[i] for i in order]).tolist()
    terms = [(reward, (i,)) for reward, i in zip(rewards, order)]
    return replace(
        _weigh(responses, terms[:limit], alpha, None, weighting, dropped),
        candidates=Counter(responses[i].source for i in kept),
        tied_at_k=cuts_a_tie(rewards, limit),
    )


def _decimal(number: float) -> Decimal:
    """The shortest decimal that reads back as `number`: what stands in the file."""
    return Decimal(repr(float(number)))


def _pair(
    responses: Sequence[Response],
    indices: list[int],
    ties: Ties,
    tokens: Tokens,
    *,
    min_gap: float | None = None,
    max_gap: float | None = None,
    graded: bool = False,
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
    chosen = best_and_worst(responses, ties, high)[0]
    rejected = best_and_worst(responses, ties, low)[1]
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
    if _alike(responses, tokens, (chosen, rejected)):
        return "same_text" if tokens is None else "same_tokens"
    return chosen, rejected


def _alike(responses: Sequence[Response], tokens: Tokens, members: Sequence[int]) -> bool:
    """Whether training sees the same in all of them: whatever their rewards, a loss over them teaches nothing.

    Texts differ where tokens do not: beyond max_length, or in blanks that the template trims.
    """
    if tokens is None:
        return len({responses[i].text for i in members}) == 1
    return all(np.array_equal(tokens[i], tokens[members[0]]) for i in members)


def pair_terms(
    responses: Sequence[Response],
    ties: Ties,
    tokens: Tokens = None,
    *,
    alpha: float = 5e-3,
    k: int | None = None,
    min_gap: float | None = None,
    max_gap: float | None = None,
    weighting: Weighting = "softmax",
    use_correct: bool = False,
) -> GroupTerms:
    """One term `[chosen, rejected]` a source (Eq. 11). `k=1` is the SFT+PO baseline: one pair a prompt, weight 1.

    Sources with one response, a tie, the same `tokens` twice (without tokens: the same text), or a gap outside
    `min_gap <= gap <= max_gap` (of the decimals that the file holds, both bounds inside) have no pair and are counted
    in `dropped`. With `use_correct`, prompts that have graded responses pair the best correct one with the worst
    incorrect one of a source (FuseChat-3.0's table). Equal rewards, inside a source and of the k-th source: by hash.

    Raises:
        DataError: a response has no reward.
    """
    dropped: Counter[tuple[str, str]] = Counter()
    terms: list[tuple[float, tuple[int, ...]]] = []
    graded = _graded(responses, use_correct)
    for source, indices in _by_source(responses).items():
        pair = _pair(responses, indices, ties, tokens, min_gap=min_gap, max_gap=max_gap, graded=graded)
        if isinstance(pair, str):
            dropped[source, pair] += 1
        else:
            terms.append((float(rewards_of([responses[pair[0]]])[0]), pair))
    return _weigh(responses, _falling(responses, ties, terms), alpha, k, weighting, dropped)


def rloo_terms(
    responses: Sequence[Response],
    ties: Ties,
    tokens: Tokens = None,
    *,
    alpha: float = 5e-3,
    k: int | None = None,
    weighting: Weighting = "softmax",
) -> GroupTerms:
    """One term with all responses of a source, for sources that have at least two; weighed by their best reward.

    A source whose responses all have the same `tokens` (without tokens: the same text) has none: the advantages, which
    sum to zero, would meet the same gradient. One whose rewards are all equal is kept, and noted as `equal_rewards`:
    nothing but the KL term gives it an advantage.

    Raises:
        DataError: a response has no reward.
    """
    dropped: Counter[tuple[str, str]] = Counter()
    terms: list[tuple[float, tuple[int, ...]]] = []
    for source, indices in _by_source(responses).items():
        if len(indices) < 2:
            dropped[source, "one_response"] += 1
        elif _alike(responses, tokens, indices):
            dropped[source, "same_text" if tokens is None else "same_tokens"] += 1
        else:
            terms.append((float(rewards_of([responses[i] for i in indices]).max()), tuple(indices)))
    found = _weigh(responses, _falling(responses, ties, terms), alpha, k, weighting, dropped)
    for members in found.members:
        if len({responses[i].reward for i in members}) == 1:
            found.noted_of[responses[members[0]].source, "equal_rewards"] += 1
    return found


def wrpo_terms(responses: Sequence[Response], ties: Ties, tokens: Tokens = None, *, target_source: str) -> GroupTerms:
    """One term `[best source response, target's own best, target's own worst]`, weight 1 (WRPO, arXiv 2412.03187).

    A prompt has none where no other source answered, the target has fewer than two responses, or its two are a tie or
    have the same `tokens` (without tokens: the same text). A source response that equals the target's worst one is kept
    and noted as `same_as_rejected`: what is left of the loss, beta (1 - a) (d(y_wt) - d(y_l)), still has a preference.

    Raises:
        DataError: a response has no reward.
    """
    own = [i for i, r in enumerate(responses) if r.source == target_source]
    others = [i for i, r in enumerate(responses) if r.source != target_source]
    if not others:
        return GroupTerms((), np.zeros(0), Counter(no_other_source=1))
    pair = _pair(responses, own, ties, tokens)
    if isinstance(pair, str):
        return GroupTerms((), np.zeros(0), Counter({f"target_{pair}": 1}))
    order = ranked(responses, ties, others)
    best, rejected = order[0], pair[1]
    noted = Counter({(responses[best].source, "same_as_rejected"): int(_alike(responses, tokens, (best, rejected)))})
    return GroupTerms(
        members=((best, *pair),),
        weights=np.ones(1),
        noted_of=+noted,
        candidates=Counter(r.source for r in responses),
        tied_at_k=cuts_a_tie(rewards_of([responses[i] for i in order]).tolist(), 1),
    )
