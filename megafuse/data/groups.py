"""One record to one row of the data set: filter responses, tokenise, apply the length rules, make the terms."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megafuse.config.build import BuildConfig
from megafuse.data.pairs import GroupTerms, pair_terms, rewards_of, rloo_terms, sft_terms, wrpo_terms
from megafuse.data.records import Response, ScoredPrompt
from megafuse.data.store import Row
from megafuse.data.tokenise import ChatTokenizer
from megafuse.errors import DataError


@dataclass(frozen=True)
class Rejected:
    """A record that the chat template refuses: a bad record."""

    record: ScoredPrompt
    reason: str


def make_terms(responses: Sequence[Response], config: BuildConfig) -> GroupTerms:
    """The terms of one prompt for the kind of data set that is built; none for `rank`."""
    alpha, k, weighting = config.resolved_alpha, config.resolved_k, config.weighting
    if config.kind == "sft":
        selection = "top_k_all" if config.selection == "auto" else config.selection
        return sft_terms(
            responses,
            selection=selection,  # type: ignore[arg-type]  # the config has checked it against the kind
            k=k,
            alpha=alpha,
            weighting=weighting,
            use_correct=config.use_correct,
        )
    if config.kind == "pair":
        return pair_terms(
            responses,
            alpha=alpha,
            k=k,
            min_gap=config.min_gap,
            max_gap=config.max_gap,
            weighting=weighting,
            use_correct=config.use_correct,
        )
    if config.kind == "rloo":
        return rloo_terms(responses, alpha=alpha, k=k, weighting=weighting)
    if config.kind == "wrpo":
        assert config.target_source is not None, "BuildConfig requires target_source for wrpo"
        return wrpo_terms(responses, target_source=config.target_source)
    return GroupTerms((), np.zeros(0))


class GroupBuilder:
    """Builds rows from records and counts, in `counts`, everything that it leaves out."""

    def __init__(self, config: BuildConfig, tokenizer: ChatTokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.counts: Counter[str] = Counter()
        self.longest_group: tuple[int, str] = (0, "")  # above max_row_tokens: tokens, prompt_id

    def __call__(self, records: Sequence[ScoredPrompt]) -> list[Row | Rejected]:
        """Rows of those records that keep at least one term, in order; all texts are tokenised in two batches.

        Raises:
            ConfigError: the tokenizer does not fit the model, or writes two BOS tokens.
        """
        records = [replace(r, responses=self._filtered(r.responses)) for r in records]
        prompts = self.tokenizer.prompts([r.messages for r in records])
        answers = iter(self.tokenizer.answers([a.text for r in records for a in r.responses]))
        rows: list[Row | Rejected] = []
        for record, prompt in zip(records, prompts):
            bodies = [next(answers) for _ in record.responses]
            if isinstance(prompt, DataError):
                rows.append(Rejected(record, str(prompt)))
                self.counts["prompts_dropped.template_refused"] += 1
                continue
            row = self._row(record, prompt, bodies)
            if isinstance(row, Row):
                rows.append(row)
            else:
                self.counts[f"prompts_dropped.{row}"] += 1
        return rows

    def _filtered(self, responses: Sequence[Response]) -> tuple[Response, ...]:
        config, kept = self.config, []
        taken: Counter[str] = Counter()
        for response in responses:
            source = response.source
            taken[source] += 1
            if (config.include_sources and source not in config.include_sources) or source in config.exclude_sources:
                reason = "source_filter"
            elif config.responses_per_source is not None and taken[source] > config.responses_per_source:
                reason = "beyond_responses_per_source"
            elif response.finish_reason == "length" and config.on_unfinished == "drop":
                reason = "unfinished"
            else:
                kept.append(response)
                continue
            self.counts[f"responses_dropped.{reason}"] += 1
        return tuple(kept)

    def _row(self, record: ScoredPrompt, prompt: np.ndarray, bodies: list[np.ndarray]) -> Row | str:
        """The row of one record, or the reason why it has none."""
        config = self.config
        if len(prompt) > (config.max_prompt_length or config.max_length - 1):
            return "long_prompt"
        if self.tokenizer.has_control_text("".join(m["content"] for m in record.messages)):
            self.counts["prompts_with_control_tokens_in_their_text"] += 1
        room = config.max_length - len(prompt)
        finished = [self._finish(body, r, room) for body, r in zip(bodies, record.responses)]
        kept = [i for i, ids in enumerate(finished) if ids is not None]
        if not kept:
            return "no_response"
        responses = [record.responses[i] for i in kept]
        terms = make_terms(responses, config)
        for reason, number in terms.dropped.items():
            self.counts[f"terms_dropped.{reason}"] += number
        used = sorted({j for term in terms.members for j in term})
        if config.kind == "rank":
            used = list(range(len(kept)))
        elif not used:
            return "no_term"
        self.counts["responses_dropped.in_no_term"] += len(kept) - len(used)
        place = {j: n for n, j in enumerate(used)}
        row = Row(
            prompt_id=record.prompt_id,
            domain=record.domain,
            prompt=prompt,
            responses=tuple(ids for j in used if (ids := finished[kept[j]]) is not None),
            sources=tuple(responses[j].source for j in used),
            rewards=rewards_of([responses[j] for j in used]),
            members=tuple(tuple(place[j] for j in term) for term in terms.members),
            weights=terms.weights,
        )
        if config.max_row_tokens is not None and row.tokens > config.max_row_tokens:
            self.longest_group = max(self.longest_group, (row.tokens, row.prompt_id))
            return "long_group"
        return row

    def _finish(self, body: np.ndarray, response: Response, room: int) -> np.ndarray | None:
        """The tokens of an answer with its end of turn, within `room` tokens; None where it is left out."""
        if not len(body):  # white space that the template trims, or that the tokenizer does not know
            self.counts["responses_dropped.no_token"] += 1
            return None
        unfinished = response.finish_reason == "length"
        whole = body if unfinished else np.concatenate([body, self.tokenizer.end_of_turn])
        if len(whole) <= room:
            self.counts["responses_without_end_of_turn"] += unfinished
            return whole
        if self.config.on_long_response == "drop":
            self.counts["responses_dropped.long_response"] += 1
            return None
        self.counts["responses_truncated"] += 1
        self.counts["responses_without_end_of_turn"] += 1
        return body[:room]
