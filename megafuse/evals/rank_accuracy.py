"""Intra- and cross-rank accuracy (FuseRL, Appendix D.1): does the model rank responses as the reward model does?

The score of a response is its MEAN log-prob per token, s(y) = log pi(y|x) / |y|, whatever loss trained the model. For a
pair of the highest-reward response y_w and the lowest-reward response y_l, the model is right when s(y_w) > s(y_l).

- intra-rank: y_w and y_l among the responses of ONE source; the accuracy of each source over the prompts, then the
  plain mean over the sources.
- cross-rank: one response of each source; y_w and y_l among those; the accuracy over the prompts.

Where the paper is silent, the choices here are:
- Rewards equal (best = worst): there is no order to find, so the pair is skipped and counted.
- Several responses share the best (or the worst) reward: the first by a hash stands for them, inside a source of
  prompt_id, source and tokens, across sources of prompt_id and source. So no source is preferred for where it stands.
- Scores equal: counts one half, what guessing would get, and is counted as a tie.
- Cross-rank takes the FIRST response of each source in file order: deterministic, and as blind to the reward as the
  order of sampling is. (A source's best response instead would measure another thing: telling good answers apart.)
- A prompt with one response of a source gives no intra pair, one with a single source no cross pair; both are counted.
- Standard error: binomial, sqrt(p(1-p)/n). Of the mean over K sources: sqrt(sum se_i^2)/K, as if sources were
  independent; they share prompts, so it is a little low.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from megafuse.data.split import hashed
from megafuse.errors import DataError, IntegrityError


class Ranked(Protocol):
    """What is needed of a prompt group; `megafuse.data.types.Group` has it."""

    @property
    def prompt_id(self) -> str:
        """Name of the prompt, for messages."""

    @property
    def sources(self) -> Sequence[str]:
        """Source of each of the n responses, in file order."""

    @property
    def responses(self) -> Sequence[np.ndarray]:
        """Tokens of each, [R_i] int32."""

    @property
    def rewards(self) -> np.ndarray:
        """[n] float64."""


@dataclass(frozen=True)
class PairAccuracy:
    """Accuracy over a set of (best, worst) pairs. Numbers that need at least one pair are None without one."""

    pairs: int
    """Pairs that count."""
    correct: float
    """Pairs ranked as the rewards rank them, score ties as one half."""
    score_ties: int
    """Pairs with equal scores, among `pairs`."""
    skipped_equal_rewards: int
    """Left out: best and worst reward are equal."""
    skipped_single: int
    """Left out: fewer than two responses to compare."""
    accuracy: float | None
    """correct / pairs."""
    standard_error: float | None
    """Binomial standard error of `accuracy`."""
    best_logp: float | None
    """Mean over pairs of the best response's log-prob per token, nats."""
    worst_logp: float | None
    """The same of the worst response."""
    margin: float | None
    """best_logp - worst_logp."""


@dataclass(frozen=True)
class RankAccuracy:
    """Rank accuracies of one model on one data set."""

    groups: int
    responses: int
    intra: float | None
    """Mean over sources of `per_source[...].accuracy` (the paper's number); sources without a pair are left out."""
    intra_standard_error: float | None
    cross: PairAccuracy
    """Over prompts; `cross.accuracy` is the paper's number."""
    intra_pooled: PairAccuracy
    """All intra pairs of all sources together: weighs a source by its pairs."""
    per_source: dict[str, PairAccuracy]
    """Intra pairs of each source, by name."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts and numbers, ready for JSON."""
        return asdict(self)


@dataclass
class _Pairs:
    """Collects pairs: the scores of their best and worst responses."""

    best: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    equal_rewards: int = 0
    single: int = 0

    def add(self, scores: np.ndarray, rewards: np.ndarray, order: Callable[[int], bytes]) -> None:
        """One candidate pair out of m responses. Both [m] float64; of equal rewards the lowest `order(i)` counts."""
        if len(rewards) < 2:
            self.single += 1
        elif rewards.max() == rewards.min():
            self.equal_rewards += 1
        else:
            best, worst = (np.flatnonzero(rewards == r).tolist() for r in (rewards.max(), rewards.min()))
            self.best.append(float(scores[min(best, key=order)]))
            self.worst.append(float(scores[min(worst, key=order)]))

    def extend(self, other: "_Pairs") -> None:
        """Take over the pairs and counts of `other`."""
        self.best += other.best
        self.worst += other.worst
        self.equal_rewards += other.equal_rewards
        self.single += other.single

    def result(self) -> PairAccuracy:
        """The statistics of what was added."""
        best, worst = np.array(self.best), np.array(self.worst)
        count = len(best)
        ties = int((best == worst).sum())
        correct = float((best > worst).sum()) + 0.5 * ties
        counts = (count, correct, ties, self.equal_rewards, self.single)
        if not count:
            return PairAccuracy(*counts, None, None, None, None, None)
        accuracy = correct / count
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        best_logp, worst_logp = float(best.mean()), float(worst.mean())
        return PairAccuracy(*counts, accuracy, error, best_logp, worst_logp, best_logp - worst_logp)


def rank_accuracy(groups: Iterable[Ranked], logps: np.ndarray, lengths: np.ndarray) -> RankAccuracy:
    """Intra- and cross-rank accuracy of a model on a data set of kind `rank`.

    Arguments:
        groups: the prompt groups in data set order (a `GroupDataset`, or anything with sources and rewards).
        logps: [R] sum of log pi over the tokens of every response, groups one behind the other, in nats.
        lengths: [R] number of those tokens.

    Raises:
        DataError: a reward is not finite, or a response has no tokens.
        IntegrityError: `logps` and `lengths` do not fit the groups, or a log-prob is not finite.
    """
    logps, lengths = np.asarray(logps, dtype=np.float64), np.asarray(lengths)
    if logps.ndim != 1 or logps.shape != lengths.shape:
        raise IntegrityError(f"log-probs {logps.shape} and lengths {lengths.shape} must be two equally long lists")
    intra: dict[str, _Pairs] = {}
    cross = _Pairs()
    start = count = 0
    for group in groups:
        end, count = start + len(group.sources), count + 1
        if end > len(logps):
            raise IntegrityError(_MISFIT.format(len(logps), count, end))
        scores, rewards = _checked(group, logps[start:end], lengths[start:end])
        sources = np.asarray(group.sources)
        names, first = np.unique(sources, return_index=True)
        for name in map(str, names):
            own = np.flatnonzero(sources == name)
            intra.setdefault(name, _Pairs()).add(scores[own], rewards[own], partial(_by_tokens, group, own))
        cross.add(scores[first], rewards[first], partial(_by_source, group, first))
        start = end
    if start != len(logps):
        raise IntegrityError(_MISFIT.format(len(logps), count, start))
    return _summary(count, len(logps), intra, cross)


_MISFIT = (
    "{} log-probs do not fit the data set, whose first {} groups have {} responses: "
    "they are of another data set; run the log-prob pass again"
)


def _by_tokens(group: Ranked, places: np.ndarray, i: int) -> bytes:
    """Sort key of the i-th of some responses of one source."""
    ids = np.ascontiguousarray(group.responses[places[i]], dtype="<i4")
    return hashed(0, group.prompt_id, group.sources[places[i]], ids.tobytes().hex())


def _by_source(group: Ranked, places: np.ndarray, i: int) -> bytes:
    """Sort key of the i-th of some responses of different sources."""
    return hashed(0, group.prompt_id, group.sources[places[i]])


def _checked(group: Ranked, logps: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rewards) of one group, both [n] float64 and finite."""
    rewards = np.asarray(group.rewards, dtype=np.float64)
    name = f"prompt_id {group.prompt_id!r}"
    if len(rewards) != len(group.sources):
        raise DataError(
            f"{name} has {len(group.sources)} responses and {len(rewards)} rewards: build the data set again"
        )
    if not np.isfinite(rewards).all():
        raise DataError(f"{name} has a reward that is not finite, {rewards.tolist()}: score its responses again")
    if (lengths < 1).any():
        raise DataError(f"{name} has a response of {lengths.min()} tokens; an end-of-turn token at least is needed")
    if not np.isfinite(logps).all():
        raise IntegrityError(
            f"{name} has a log-prob that is not finite, {logps.tolist()}: the model or its run is broken"
        )
    return logps / lengths, rewards


def _summary(groups: int, responses: int, intra: dict[str, _Pairs], cross: _Pairs) -> RankAccuracy:
    """Averages over sources, in the order of their names so that sums do not depend on the data's order."""
    pooled = _Pairs()
    per_source: dict[str, PairAccuracy] = {}
    for name in sorted(intra):
        pooled.extend(intra[name])
        per_source[name] = intra[name].result()
    accuracies = [s.accuracy for s in per_source.values() if s.accuracy is not None]
    errors = [s.standard_error for s in per_source.values() if s.standard_error is not None]
    return RankAccuracy(
        groups=groups,
        responses=responses,
        intra=math.fsum(accuracies) / len(accuracies) if accuracies else None,
        intra_standard_error=math.sqrt(math.fsum(e * e for e in errors)) / len(errors) if errors else None,
        cross=cross.result(),
        intra_pooled=pooled.result(),
        per_source=per_source,
    )
