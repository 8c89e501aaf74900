"""What became of every prompt and response, counted in all, by domain, by data set of origin, and by source."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megafuse.data.records import ScoredPrompt

CATEGORIES = {
    "instruction": "Instruction following",
    "math": "Mathematics",
    "coding": "Coding",
    "chinese": "Chinese language",
}
TIE_ADVICE = (
    "Equal rewards do not say which answer is better: the sources take turns, in an order by hash. Score with a reward "
    "model too (`megafuse score --reward armorm --model FOLDER`; `correct` stays beside its reward) and build with "
    '`--use_correct`, or `correct = "required"` in domain_rules: correct AND highest reward, as FuseChat-3.0 does.'
)
UNNAMED = "(not named)"  # prompts whose record has no `dataset`


@dataclass
class Tally:
    """Counters by name; `total` is the sum of `domains`, and of `origins`; sources count responses and terms only."""

    total: Counter[str] = field(default_factory=Counter)
    domains: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    origins: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def prompt(self, record: ScoredPrompt, name: str, number: int = 1) -> None:
        """Count something that happened to a prompt."""
        self.total[name] += number
        self.domains[record.domain][name] += number
        self.origins[record.domain, record.dataset or UNNAMED][name] += number

    def response(self, record: ScoredPrompt, source: str, name: str, number: int = 1) -> None:
        """Count something that happened to a response, or to a source of a prompt."""
        self.prompt(record, name, number)
        self.sources[source][name] += number

    def composition(self) -> list[dict[str, Any]]:
        """One row a data set of origin, by domain and name: prompts given, kept, and why the others are not."""
        return [
            {
                "dataset": dataset,
                "domain": domain,
                "prompts": counts["prompts"],
                "kept": counts["prompts_kept"],
                "left_out": _reasons(counts, "prompts_left_out."),
                "dropped": _reasons(counts, "prompts_dropped."),
            }
            for (domain, dataset), counts in sorted(self.origins.items())
        ]

    def by_domain(self) -> dict[str, dict[str, int]]:
        """Every count of every domain."""
        return {domain: dict(sorted(counts.items())) for domain, counts in sorted(self.domains.items())}

    def by_source(self) -> dict[str, dict[str, int]]:
        """Every count of every source."""
        return {source: dict(sorted(counts.items())) for source, counts in sorted(self.sources.items())}


def _reasons(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in sorted(counts.items()) if name.startswith(prefix) and n}
