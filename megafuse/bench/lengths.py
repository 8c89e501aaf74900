"""The lengths of real prompts and responses: all that throughput depends on, read from a data set or from texts.

Of each source the best response by reward and the worst are kept (of more, the next best too); sources come by falling
best reward, equal ones in the order of a hash as in `data.select`. So K = 4 means what training would mean by it, and
K = 16 holds the same responses and more.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megafuse.data.dataset import GroupDataset
from megafuse.data.reader import RecordReader
from megafuse.data.records import Response, Rules
from megafuse.data.select import Ties
from megafuse.data.split import hashed
from megafuse.errors import ConfigError, DataError


@dataclass(frozen=True)
class PromptLengths:
    """Tokens of a prompt, and of the responses kept of each of its sources: best source first, best response first."""

    prompt: int
    sources: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LengthData:
    """Prompts with at least one source, the rule that counted their tokens, and what was left out and why."""

    prompts: list[PromptLengths]
    rule: str
    left_out: dict[str, int]


class TokenRule(Protocol):
    """How many tokens a text has."""

    name: str

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a conversation up to the place where the answer starts."""

    def answers(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each answer, end of turn included."""


class ByteRule:
    """UTF-8 bytes / `per_token`, rounded up: near 4 for English under today's vocabularies. No tokenizer needed."""

    def __init__(self, per_token: float) -> None:
        self.per_token = per_token
        self.name = f"UTF-8 bytes / {per_token:g}, rounded up; +1 a response for its end of turn"

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        """The contents alone: a chat template would add a few tokens. At least 1."""
        return max(1, self._tokens("".join(m["content"] for m in messages)))

    def answers(self, texts: Sequence[str]) -> list[int]:
        """One more than the text has."""
        return [self._tokens(text) + 1 for text in texts]

    def _tokens(self, text: str) -> int:
        return math.ceil(len(text.encode()) / self.per_token)


class TokenizerRule:
    """The tokens that `megafuse build` would make with this Hugging Face folder, chat template included."""

    def __init__(self, folder: Path) -> None:
        from megafuse.data.tokenise import ChatTokenizer

        try:
            self._tokenizer = ChatTokenizer(folder)
        except ConfigError as e:
            raise ConfigError(
                f"{e}. Or give what `megafuse build` wrote, whatever its settings, as data.path"
            ) from None
        self.name = f"tokenizer and chat template of {folder.name}"

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Raises DataError for a conversation that the template refuses."""
        (ids,) = self._tokenizer.prompts([messages])
        if isinstance(ids, DataError):
            raise ids
        return len(ids)

    def answers(self, texts: Sequence[str]) -> list[int]:
        """The text's tokens and those of the end of turn."""
        return [len(answer.whole) for answer in self._tokenizer.answers(texts)]


def source_name(response: Response) -> str:
    """The source that the file names."""
    return response.source


def read_lengths(
    path: Path,
    rule: TokenRule,
    *,
    responses: int,
    max_length: int,
    source_of: Callable[[Response], str] = source_name,
) -> LengthData:
    """Lengths of every prompt of a data set folder, or of a file of scored answers.

    Arguments:
        path: folder written by `megafuse build` (its own token counts are taken), or .jsonl / .jsonl.gz.
        rule: counts the tokens of texts.
        responses: responses kept of each source; a source with fewer is left out.
        max_length: of texts: tokens of a prompt and one response; longer responses are left out.
        source_of: of texts: which source a response belongs to.
    Raises:
        ConfigError: `path` is not there, or nothing in it has that many responses of one source.
        DataError, IntegrityError: what is there cannot be read.
    """
    if path.is_dir():
        data = _from_dataset(GroupDataset(path), responses)
    elif path.is_file():
        data = _from_texts(path, rule, responses, max_length, source_of)
    else:
        raise ConfigError(
            f"data.path = {path} does not exist: give a data set folder written by `megafuse build`, or a file of "
            f"scored answers (.jsonl, .jsonl.gz)"
        )
    if not data.prompts:
        raise ConfigError(
            f"data.path = {path}: no prompt has {responses} usable response(s) of one source (left out: "
            f"{data.left_out}); lower responses_per_source, raise data.max_length, or give other data"
        )
    return data


def _from_dataset(data: GroupDataset, responses: int) -> LengthData:
    dropped: Counter[str] = Counter()
    prompts = []
    for group in data:
        found = zip(group.sources, group.rewards.tolist(), group.response_lengths.tolist())
        prompts += _kept(Ties(group.prompt_id, seed=0), len(group.prompt), found, responses, dropped)
    return LengthData(prompts, "as tokenised by `megafuse build`", dict(dropped))


def _from_texts(
    path: Path, rule: TokenRule, responses: int, max_length: int, source_of: Callable[[Response], str]
) -> LengthData:
    dropped: Counter[str] = Counter()
    prompts = []
    reader = RecordReader([path], Rules(drop_bad_responses=True), on_bad_record="skip")
    for record in reader:
        prompt = rule.prompt(record.messages)
        lengths = rule.answers([r.text for r in record.responses])
        found = []
        for response, length in zip(record.responses, lengths):
            if prompt + length > max_length:
                dropped["responses above max_length"] += 1
            else:
                found.append((source_of(response), float(response.reward or 0.0), length))
        prompts += _kept(Ties(record.prompt_id, seed=0), prompt, found, responses, dropped)
    dropped["bad records"] += reader.error_count
    dropped["responses without text or reward"] += sum(
        number for name, number in reader.counts.items() if name.startswith("responses_dropped.")
    )
    return LengthData(prompts, rule.name, {k: v for k, v in dropped.items() if v})


def _kept(
    ties: Ties, prompt: int, found: Iterable[tuple[str, float, int]], responses: int, dropped: Counter[str]
) -> list[PromptLengths]:
    """The prompt with the responses (source, reward, tokens) that are kept; nothing where no source has enough."""
    by_source: dict[str, list[tuple[float, int]]] = {}
    for source, reward, tokens in found:
        by_source.setdefault(source, []).append((reward, tokens))
    sources = []
    for source in sorted(by_source, key=ties.source):
        scored = by_source[source]
        if len(scored) < responses:
            dropped[f"sources with fewer than {responses} responses"] += 1
            continue
        ranked = sorted(scored, key=lambda pair: (-pair[0], hashed(ties.seed, ties.prompt_id, str(pair[1]))))
        chosen = [*ranked[: responses - 1], ranked[-1]] if responses > 1 else ranked[:1]
        sources.append((ranked[0][0], tuple(tokens for _, tokens in chosen)))
    if not sources:
        dropped["prompts without a source"] += 1
        return []
    return [PromptLengths(prompt, tuple(tokens for _, tokens in sorted(sources, key=lambda s: -s[0])))]


def widen(prompts: Sequence[PromptLengths], count: int, seed: int) -> tuple[list[PromptLengths], int]:
    """Every prompt with exactly `count` sources, and how many of all these were borrowed.

    A prompt with fewer borrows whole sources from other prompts, at random by `seed`. Real lengths, then, but not of
    answers to this prompt.
    """
    pool = [(i, source) for i, prompt in enumerate(prompts) for source in prompt.sources]
    rng = np.random.default_rng(seed)
    wide, borrowed = [], 0
    for i, prompt in enumerate(prompts):
        sources = list(prompt.sources[:count])
        while len(sources) < count:
            owner, source = pool[int(rng.integers(len(pool)))]
            if owner != i or len(prompts) == 1:
                sources.append(source)
                borrowed += 1
        wide.append(PromptLengths(prompt.prompt, tuple(sources)))
    return wide, borrowed


def summary(prompts: Sequence[PromptLengths]) -> dict[str, Any]:
    """Mean and percentiles of prompt and response lengths, and how many sources prompts have."""
    answers = [length for p in prompts for source in p.sources for length in source]
    counts = Counter(len(p.sources) for p in prompts)
    return {
        "prompts": len(prompts),
        "prompt_tokens": _spread([p.prompt for p in prompts]),
        "response_tokens": _spread(answers),
        "prompts_by_number_of_sources": {str(k): counts[k] for k in sorted(counts)},
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    p50, p95 = np.percentile(values, (50, 95))
    return {"mean": round(float(np.mean(values)), 1), "p50": float(p50), "p95": float(p95), "max": int(max(values))}
