"""One record to one row of the data set: filter responses, tokenise, apply the length rules, make the terms."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megafuse.config.build import BuildConfig
from megafuse.config.rules import DomainRule
from megafuse.data.pairs import GroupTerms, pair_terms, rloo_terms, sft_terms, wrpo_terms
from megafuse.data.records import Response, ScoredPrompt
from megafuse.data.select import Ties, rewards_of
from megafuse.data.store import Row
from megafuse.data.tally import Tally
from megafuse.data.tokenise import Answer, ChatTokenizer
from megafuse.errors import DataError

BEYOND_POSITIONS = "responses_beyond_max_position_embeddings"
CANDIDATES = "responses_to_select_from"
CUT = "prompts_with_a_cut"  # their selection takes the k highest
TIED = "prompts_with_a_cut_through_a_tie"  # the k-th has the reward of one left out


@dataclass(frozen=True)
class Rejected:
    """A record that the chat template refuses: a bad record."""

    record: ScoredPrompt
    reason: str


def make_terms(
    record: ScoredPrompt, responses: Sequence[Response], tokens: Sequence[np.ndarray], config: BuildConfig
) -> GroupTerms:
    """The terms of one prompt over `responses`, whose `tokens` are finished, for the kind of data set; none for `rank`.

    Raises:
        DataError: a response has no reward.
    """
    alpha, k, weighting = config.resolved_alpha, config.resolved_k, config.weighting
    ties = Ties(record.prompt_id, config.seed)
    rule = config.rule_of(record.domain)
    if rule is not None and config.kind in ("sft", "pair"):
        return _ruled_terms(responses, ties, tokens, config, rule)
    if config.kind == "sft":
        selection = "top_k_all" if config.selection == "auto" else config.selection
        return sft_terms(
            responses,
            ties,
            selection=selection,  # type: ignore[arg-type]  # the config has checked it against the kind
            k=k,
            alpha=alpha,
            weighting=weighting,
            use_correct=config.use_correct,
        )
    if config.kind == "pair":
        return pair_terms(
            responses,
            ties,
            tokens,
            alpha=alpha,
            k=k,
            min_gap=config.min_gap,
            max_gap=config.max_gap,
            weighting=weighting,
            use_correct=config.use_correct,
        )
    if config.kind == "rloo":
        return rloo_terms(responses, ties, tokens, alpha=alpha, k=k, weighting=weighting)
    if config.kind == "wrpo":
        assert config.target_source is not None, "BuildConfig requires target_source for wrpo"
        return wrpo_terms(responses, ties, tokens, target_source=config.target_source)
    return GroupTerms((), np.zeros(0))


def _ruled_terms(
    responses: Sequence[Response], ties: Ties, tokens: Sequence[np.ndarray], config: BuildConfig, rule: DomainRule
) -> GroupTerms:
    """The terms that the rule of the prompt's domain makes, for kinds sft and pair."""
    required = rule.correct == "required"
    if config.kind == "sft":
        assert rule.sft != "none", "prompts of such a domain are not chosen"
        k = (config.k or 4) if rule.sft == "top_k_all" else config.k
        return sft_terms(
            responses,
            ties,
            selection=rule.sft,
            k=k,
            alpha=config.resolved_alpha,
            weighting=config.weighting,
            use_correct=required,
        )
    return pair_terms(
        responses,
        ties,
        tokens,
        alpha=config.resolved_alpha,
        k=1 if rule.pair == "top1" else config.k,
        min_gap=rule.min_gap,
        max_gap=rule.max_gap,
        weighting=config.weighting,
        use_correct=required,
    )


class GroupBuilder:
    """Builds rows from records and counts, in `tally`, everything that it keeps and leaves out.

    `positions`, max_position_embeddings of the model: sequences with more tokens are counted; None: not known.
    """

    def __init__(
        self,
        config: BuildConfig,
        tokenizer: ChatTokenizer,
        tally: Tally | None = None,
        *,
        positions: int | None = None,
    ) -> None:
        self.config, self.tokenizer, self.positions = config, tokenizer, positions or sys.maxsize
        self.tally = tally if tally is not None else Tally()
        self.longest_group: tuple[int, str] = (0, "")  # above max_row_tokens: tokens, prompt_id

    def __call__(self, records: Sequence[ScoredPrompt]) -> list[Row | Rejected]:
        """Rows of those records that keep at least one term, in order; all texts are tokenised in two batches.

        Raises:
            ConfigError: the tokenizer does not fit the model, or writes two BOS tokens.
        """
        records = [replace(r, responses=self._filtered(r)) for r in records]
        prompts = self.tokenizer.prompts([r.messages for r in records])
        answers = iter(self.tokenizer.answers([a.text for r in records for a in r.responses]))
        rows: list[Row | Rejected] = []
        for record, prompt in zip(records, prompts):
            own = [next(answers) for _ in record.responses]
            if isinstance(prompt, DataError):
                rows.append(Rejected(record, str(prompt)))
                self.tally.prompt(record, "prompts_dropped.template_refused")
                continue
            row = self._row(record, prompt, own)
            if isinstance(row, Row):
                rows.append(row)
                self.tally.prompt(record, "prompts_kept")
                for source, ids in zip(row.sources, row.responses):
                    self.tally.response(record, source, "responses_kept")
                    if len(row.prompt) + len(ids) > self.positions:
                        self.tally.response(record, source, BEYOND_POSITIONS)
            else:
                self.tally.prompt(record, f"prompts_dropped.{row}")
        return rows

    def _filtered(self, record: ScoredPrompt) -> tuple[Response, ...]:
        config, kept = self.config, []
        rule = config.rule_of(record.domain) or DomainRule()
        limit = min(rule.responses_per_source or sys.maxsize, config.responses_per_source or sys.maxsize)
        taken: Counter[str] = Counter()
        for response in record.responses:
            source = response.source
            taken[source] += 1
            if (config.include_sources and source not in config.include_sources) or source in config.exclude_sources:
                reason = "source_filter"
            elif rule.sources and source not in rule.sources:
                reason = "not_a_source_of_the_domain"
            elif taken[source] > limit:
                reason = "beyond_responses_per_source"
            elif response.finish_reason == "length" and config.on_unfinished == "drop":
                reason = "unfinished"
            else:
                kept.append(response)
                continue
            self.tally.response(record, source, f"responses_dropped.{reason}")
        return tuple(kept)

    def _row(self, record: ScoredPrompt, prompt: np.ndarray, answers: list[Answer]) -> Row | str:
        """The row of one record, or the reason why it has none."""
        config = self.config
        if len(prompt) > (config.max_prompt_length or config.max_length - 1):
            return "long_prompt"
        if self.tokenizer.has_control_text("".join(m["content"] for m in record.messages)):
            self.tally.prompt(record, "prompts_with_control_tokens_in_their_text")
        room = config.max_length - len(prompt)
        finished = [self._finish(record, r, answer, room) for answer, r in zip(answers, record.responses)]
        kept = [(r, ids) for r, ids in zip(record.responses, finished) if ids is not None]
        if not kept:
            return "no_response"
        responses, tokens = [r for r, _ in kept], [ids for _, ids in kept]
        if reason := self._failed(record.domain, responses):
            return reason
        terms = make_terms(record, responses, tokens, config)
        self._count_terms(record, terms)
        used = sorted({j for term in terms.members for j in term})
        if config.kind == "rank":
            used = list(range(len(kept)))
        elif not used:
            return "no_term"
        for j in set(range(len(kept))) - set(used):
            self.tally.response(record, responses[j].source, "responses_dropped.in_no_term")
        place = {j: n for n, j in enumerate(used)}
        row = Row(
            prompt_id=record.prompt_id,
            domain=record.domain,
            prompt=prompt,
            responses=tuple(tokens[j] for j in used),
            sources=tuple(responses[j].source for j in used),
            rewards=rewards_of([responses[j] for j in used]),
            members=tuple(tuple(place[j] for j in term) for term in terms.members),
            weights=terms.weights,
        )
        if config.max_row_tokens is not None and row.tokens > config.max_row_tokens:
            self.longest_group = max(self.longest_group, (row.tokens, row.prompt_id))
            return "long_group"
        return row

    def _failed(self, domain: str, responses: Sequence[Response]) -> str:
        """Why a prompt is left out whose domain requires a correct response; "" where it is not."""
        rule = self.config.rule_of(domain)
        if rule is None or rule.correct != "required" or self.config.kind not in ("sft", "pair"):
            return ""
        if all(r.correct is None for r in responses):
            return "ungraded"
        return "" if any(r.correct for r in responses) else "all_failed"

    def _count_terms(self, record: ScoredPrompt, terms: GroupTerms) -> None:
        for (source, reason), number in terms.dropped_of.items():
            self.tally.response(record, source, f"terms_dropped.{reason}", number)
        for (source, what), number in terms.noted_of.items():
            self.tally.response(record, source, f"terms_kept.{what}", number)
        for source, number in terms.candidates.items():
            self.tally.response(record, source, CANDIDATES, number)
        if terms.tied_at_k is not None:
            self.tally.prompt(record, CUT)
        if terms.tied_at_k:
            self.tally.prompt(record, TIED)
        if not terms.dropped_of:  # WRPO: reasons of the prompt, of no one source
            for reason, number in terms.dropped.items():
                self.tally.prompt(record, f"terms_dropped.{reason}", number)

    def _finish(self, record: ScoredPrompt, response: Response, answer: Answer, room: int) -> np.ndarray | None:
        """The tokens of an answer with its end of turn, within `room` tokens; None where it is left out."""

        def count(name: str) -> None:
            self.tally.response(record, response.source, name)

        if answer.dropped:
            count(f"responses_dropped.{answer.dropped}")
            return None
        for note in answer.notes:
            count(f"responses_with_{note}")
        unfinished = response.finish_reason == "length"
        whole = answer.body if unfinished else answer.whole
        if len(whole) <= room:
            if unfinished:
                count("responses_without_end_of_turn")
            return whole
        if self.config.on_long_response == "drop":
            count("responses_dropped.long_response")
            return None
        count("responses_truncated")
        count("responses_without_end_of_turn")
        return answer.body[:room]
