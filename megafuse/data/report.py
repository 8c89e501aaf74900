"""Numbers about scored answers to look at before training: what the sources are worth, and which alpha mixes them."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from megafuse.data.pairs import TOP_K, pair_terms, sft_terms
from megafuse.data.reader import RecordReader
from megafuse.data.records import Rules, ScoredPrompt
from megafuse.data.select import Ties
from megafuse.data.weights import source_weights

ALPHAS = tuple(float(x) for x in np.logspace(-4, 1, 26))
SHOWN_GROUPS = 10
Lengths = Callable[[Sequence[str]], list[int]]


@dataclass
class ReportData:
    """Everything the page shows, as plain numbers."""

    prompts: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    rewards: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by source
    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by source
    correct: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    finish: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    wins: Counter[tuple[str, str]] = field(default_factory=Counter)  # best response of one above that of the other
    met: Counter[tuple[str, str]] = field(default_factory=Counter)  # prompts that both answered
    best: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # prompts it is best of; ties shared
    gaps: list[float] = field(default_factory=list)  # of pairs inside a source
    no_pair: Counter[str] = field(default_factory=Counter)
    longer_chosen: int = 0
    longer_rejected: int = 0
    effective: np.ndarray = field(default_factory=lambda: np.zeros(len(ALPHAS)))  # mean exp(entropy) at each alpha
    taken: Counter[str] = field(default_factory=Counter)  # responses that `top_k_all` takes with k = TOP_K, by source
    tied_at_k: int = 0  # prompts where the last of those ties with one left out
    several: int = 0  # prompts with several sources
    dropped: Counter[str] = field(default_factory=Counter)
    groups: list[ScoredPrompt] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """Names, best mean reward first."""
        return sorted(self.rewards, key=lambda s: (-float(np.mean(self.rewards[s])), s))

    def win_rate(self, one: str, two: str) -> float | None:
        """Share of the prompts that both answered in which the best of `one` is above that of `two`, a tie half."""
        met = self.met[one, two]
        if not met:
            return None
        ties = met - self.wins[one, two] - self.wins[two, one]
        return (self.wins[one, two] + ties / 2) / met


def collect(
    paths: Sequence[Path], *, reward_field: str = "reward", lengths: Lengths | None = None, seed: int = 0
) -> ReportData:
    """Read scored answers. Lengths are in characters where `lengths` is None.

    Raises:
        DataError: bad lines; responses without text or reward are counted and left out.
    """
    reader = RecordReader(paths, Rules(reward_field=reward_field, drop_bad_responses=True))
    data, rng = ReportData(), random.Random(seed)
    for record in reader:
        for source, reason in record.dropped:
            data.dropped[f"{source}: {reason}"] += 1
        if not record.responses:
            data.dropped["prompts without a usable response"] += 1
            continue
        _add(data, record, lengths, Ties(record.prompt_id, seed))
        # reservoir sampling: every prompt has the same chance to be shown
        if len(data.groups) < SHOWN_GROUPS:
            data.groups.append(record)
        elif (place := rng.randrange(data.prompts)) < SHOWN_GROUPS:
            data.groups[place] = record
    if data.several:
        data.effective /= data.several
    return data


def _add(data: ReportData, record: ScoredPrompt, lengths: Lengths | None, ties: Ties) -> None:
    data.prompts += 1
    data.domains[record.domain] += 1
    texts = [r.text for r in record.responses]
    sizes = lengths(texts) if lengths is not None else [len(t) for t in texts]
    best: dict[str, float] = {}
    for response, size in zip(record.responses, sizes):
        reward, source = response.reward or 0.0, response.source
        data.rewards[source].append(reward)
        data.lengths[source].append(size)
        data.correct[source][{True: "correct", False: "incorrect", None: "not graded"}[response.correct]] += 1
        data.finish[source][response.finish_reason or "not known"] += 1
        best[source] = max(best.get(source, reward), reward)
    winners = [source for source, reward in best.items() if reward == max(best.values())]
    for source in winners:
        data.best[source] += 1 / len(winners)
    for one, two in combinations(best, 2):
        data.met[one, two] += 1
        data.met[two, one] += 1
        if best[one] != best[two]:
            data.wins[(one, two) if best[one] > best[two] else (two, one)] += 1
    if len(best) > 1:
        data.several += 1
        data.effective += [effective_sources(list(best.values()), alpha) for alpha in ALPHAS]
    top = sft_terms(record.responses, ties, k=TOP_K)
    data.taken.update(record.responses[i].source for (i,) in top.members)
    data.tied_at_k += bool(top.tied_at_k)
    terms = pair_terms(record.responses, ties)
    data.no_pair.update(terms.dropped)
    for chosen, rejected in terms.members:
        data.gaps.append((record.responses[chosen].reward or 0.0) - (record.responses[rejected].reward or 0.0))
        data.longer_chosen += sizes[chosen] > sizes[rejected]
        data.longer_rejected += sizes[chosen] < sizes[rejected]


def effective_sources(rewards: Sequence[float], alpha: float) -> float:
    """exp of the entropy of Eq. 8's weights: 1 where one source has it all, their number where all weigh the same."""
    weights = source_weights(rewards, alpha)
    kept = weights[weights > 0]
    return float(np.exp(-(kept * np.log(kept)).sum()))
