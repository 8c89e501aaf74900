"""Statistics and errors of input files, before anything is built from them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megafuse.data.pairs import pair_terms, sft_terms
from megafuse.data.reader import RecordReader
from megafuse.data.records import BadRecord, Form, Rules, ScoredPrompt
from megafuse.data.select import Ties
from megafuse.errors import DataError

PERCENTILES = (0, 50, 95, 100)
Lengths = Callable[[Sequence[str]], list[int]]


@dataclass
class SourceStats:
    """Running numbers of one source."""

    responses: int = 0
    chars: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@dataclass
class DataReport:
    """What is in some files, and what is wrong with them."""

    errors: list[BadRecord] = field(default_factory=list)  # the first 20
    error_count: int = 0
    fatal: str = ""  # a file that could not be read to its end
    prompts: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    sources: dict[str, SourceStats] = field(default_factory=dict)
    graded: int = 0  # responses with `correct`
    dropped: Counter[str] = field(default_factory=Counter)  # bad responses by reason, where they are tolerated
    prompt_chars: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # reward gap of each pair that `kind = "pair"` would build
    no_pair: Counter[str] = field(default_factory=Counter)  # sources of a prompt without a pair, by reason
    tied_at_k: int = 0  # prompts where the last that `top_k_all` takes, with its default k, ties with one left out
    needs_responses: bool = True  # by the form of the files

    @property
    def ok(self) -> bool:
        """Whether there is something to work with, and every line is a good one."""
        return not self.nothing_left and not self.error_count and not self.fatal

    @property
    def nothing_left(self) -> bool:
        """Whether no good record, or in no good record a response, is left."""
        return not (self.responses if self.needs_responses else self.prompts)

    @property
    def responses(self) -> int:
        """Number of good responses."""
        return sum(s.responses for s in self.sources.values())

    @property
    def tie_rate(self) -> float:
        """Fraction of the sources with several responses to a prompt whose best and worst reward are equal."""
        several = len(self.gaps) + sum(self.no_pair[r] for r in ("tie", "same_text"))
        return self.no_pair["tie"] / several if several else 0.0


def check(
    paths: Sequence[Path],
    *,
    form: Form = "scored",
    reward_field: str = "reward",
    drop_bad_responses: bool = False,
    lengths: Lengths | None = None,
) -> DataReport:
    """Read the files to their end and sum them up. Bad records are left out of the statistics, and reported.

    Args:
        paths: `.jsonl` files or gzips of them.
        form: what a record must have: `prompts` need no responses, `responses` need no reward.
        reward_field: key of a response that holds its reward.
        drop_bad_responses: count responses without text or reward instead of reporting their record.
        lengths: tokens of each of some texts; None: characters only.
    """
    report = DataReport(needs_responses=form != "prompts")
    rules = Rules(form=form, reward_field=reward_field, drop_bad_responses=drop_bad_responses)
    reader = RecordReader(paths, rules, on_bad_record="skip")
    try:
        for record in reader:
            _add(report, record, lengths, scored=form == "scored")
    except DataError as e:
        report.fatal = str(e)
    report.errors, report.error_count = reader.errors, reader.error_count
    prefix = "responses_dropped."
    report.dropped.update({k.removeprefix(prefix): v for k, v in reader.counts.items() if k.startswith(prefix)})
    return report


def _add(report: DataReport, record: ScoredPrompt, lengths: Lengths | None, *, scored: bool) -> None:
    report.prompts += 1
    report.domains[record.domain] += 1
    texts = ["\n".join(m["content"] for m in record.messages), *(r.text for r in record.responses)]
    report.prompt_chars.append(len(texts[0]))
    tokens = lengths(texts) if lengths is not None else []
    report.prompt_tokens.extend(tokens[:1])
    for i, response in enumerate(record.responses):
        stats = report.sources.setdefault(response.source, SourceStats())
        stats.responses += 1
        stats.chars.append(len(response.text))
        stats.tokens.extend(tokens[i + 1 : i + 2])
        if response.reward is not None:
            stats.rewards.append(response.reward)
        report.graded += response.correct is not None
    if scored:
        ties = Ties(record.prompt_id, seed=0)  # no count depends on it
        report.tied_at_k += bool(sft_terms(record.responses, ties).tied_at_k)
        terms = pair_terms(record.responses, ties)
        report.no_pair.update(terms.dropped)
        reward = [r.reward or 0.0 for r in record.responses]
        report.gaps.extend(reward[chosen] - reward[rejected] for chosen, rejected in terms.members)


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """Minimum, median, 95th percentile and maximum; zeros of nothing."""
    return tuple(float(x) for x in np.percentile(values, PERCENTILES)) if len(values) else (0.0,) * len(PERCENTILES)
