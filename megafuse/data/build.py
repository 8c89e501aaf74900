"""Scored answers to a tokenised data set, in two passes over the input.

The first pass checks every line and notes which prompts are taken: nothing is tokenised if the input is to be refused.
The second pass tokenises those and appends the groups to a stream, which is sorted by prompt_id at the end: neither
the order of the input files nor of their lines changes the result.
"""

import json
import math
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.config.base import decisive_settings
from megafuse.config.build import BuildConfig
from megafuse.data.groups import BEYOND_POSITIONS, GroupBuilder, Rejected
from megafuse.data.reader import RecordReader, file_digest
from megafuse.data.records import BadRecord, Rules, ScoredPrompt
from megafuse.data.split import draws, in_part, side_of
from megafuse.data.store import (
    FORMAT,
    GROUPS,
    MANIFEST,
    Row,
    RowWriter,
    atomic_folder,
    check_replaceable,
    content_digest,
    file_sizes,
    read_manifest,
    save_sorted,
)
from megafuse.data.tally import Tally
from megafuse.data.tokenise import ChatTokenizer
from megafuse.errors import DataError

_PROMPTS_A_BATCH = 256
_PATHS = ("inputs", "output", "tokenizer", "chat_template", "overwrite", "beside")  # told apart by content, not by name
_LATER = ("domain_rules", "thinking", "system_messages")
TIES = "sources in turn, by hash of seed, prompt_id and source"  # `ties` of a manifest: see data.select
OLD_TIES = (
    "it is of an earlier version, in which of equal rewards the source that stands first in the file was taken, and "
    "pairs of equal tokens were kept; with overwrite (--overwrite) the data set is built anew"
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildResult:
    """What `build` did."""

    path: Path
    manifest: dict[str, Any]
    fresh: bool  # False: the same data set was there already
    warnings: tuple[str, ...] = ()


def build(config: BuildConfig, progress: Progress | None = None) -> BuildResult:
    """Build the data set that `config` describes, or find that it is already there.

    Args:
        config: the whole description.
        progress: called with (prompts done, prompts in all) after each batch.

    Raises:
        ConfigError: the tokenizer, its template or its vocabulary cannot be used.
        DataError: bad records, a group above max_row_tokens, nothing left to train on, or an output that is in the way.
    """
    tokenizer = ChatTokenizer(
        config.tokenizer,
        chat_template=config.chat_template,
        template_kwargs=config.template_kwargs,
        end_of_turn=config.end_of_turn,
        vocab_size=config.vocab_size,
        thinking_in_answers=config.thinking == "in_answers",
        fold_system=config.system_messages == "first_user_turn",
    )
    stamps = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in config.inputs if path.exists()}
    identity = _identity(config, tokenizer)
    existing = read_manifest(config.output)
    if existing is not None:
        other = [key for key, value in identity.items() if not _equal(existing.get(key), value)]
        old = other == ["ties"] and "ties" not in existing
        if not other or (old and not config.overwrite):
            warnings = [*existing.get("warnings", []), *([OLD_TIES] if old else [])]
            return BuildResult(config.output, existing, fresh=False, warnings=tuple(warnings))
    check_replaceable(config.output, overwrite=config.overwrite)

    reader = RecordReader(
        config.inputs,
        Rules(reward_field=config.reward_field, drop_bad_responses=config.on_bad_response == "drop"),
        on_bad_record=config.on_bad_record,
        quarantine=config.output.with_name(f"{config.output.name}.quarantine.jsonl"),
        advice='on_bad_record = "skip" sets them aside',
    )
    tally = Tally()
    wanted = _choose(reader, config, tally)
    positions = max_positions(config.tokenizer)
    groups = GroupBuilder(config, tokenizer, tally, positions=positions)
    with atomic_folder(config.output, overwrite=config.overwrite) as work:
        rows = _rows(reader, wanted, groups, progress)
        summary = _write(rows, work, config.kind)
        if config.on_bad_record == "refuse":
            reader.raise_errors()
        _check_groups(config, groups, summary["groups"])
        for path, stamp in stamps.items():
            if (path.stat().st_size, path.stat().st_mtime_ns) != stamp:
                raise DataError(f"{path} changed while it was read: build again when nothing writes to it")
        digest = {**identity["digest"], "data": summary.pop("data_digest")}
        manifest = {
            "format": FORMAT,
            "kind": config.kind,
            **summary,
            "vocab_size": tokenizer.vocab_size,
            "end_of_turn": tokenizer.end_of_turn.tolist(),
            **{**identity, "digest": digest},
            "config": config.model_dump(mode="json"),
            "counts": _all_counts(reader, tally),
            "composition": tally.composition(),
            "counts_by_domain": tally.by_domain(),
            "counts_by_source": tally.by_source(),
            "warnings": _warnings(tokenizer, tally, positions, summary["max_sequence_tokens"]),
            "versions": _versions(),
            "files": file_sizes(work, GROUPS),
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return BuildResult(config.output, manifest, fresh=True, warnings=tuple(manifest["warnings"]))


def _identity(config: BuildConfig, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What determines the result: bytes of the inputs, settings with their defaults resolved, tokenizer, template."""
    settings = decisive_settings(config, leave_out=_PATHS, later=_LATER)
    ties = {} if config.kind == "rank" else {"ties": TIES}  # a rank data set takes every response
    settings |= {"part": config.resolved_part, "alpha": config.resolved_alpha, "k": config.resolved_k}
    return {
        "inputs": [{"name": path.name, "sha256": file_digest(path)} for path in config.inputs],
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "digest": {"tokenizer": tokenizer.digest, "template": tokenizer.template_digest},
        **ties,
    }


def _equal(found: Any, wanted: Any) -> bool:
    """Equal, where the manifest may hold more keys than are compared (digest.data) and input names do not count."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(_equal(found.get(key), value) for key, value in wanted.items() if key != "name")
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(_equal, found, wanted))
    return bool(found == wanted)


def _choose(reader: RecordReader, config: BuildConfig, tally: Tally) -> set[tuple[str, int]]:
    """First pass: the (file, line) of every prompt that is taken. Raises DataError for bad records."""
    chosen: list[tuple[float, str, tuple[str, int]]] = []
    for record in reader:
        tally.prompt(record, "prompts")
        for response in record.responses:
            tally.response(record, response.source, "input_responses")
        for source, reason in record.dropped:
            tally.response(record, source, "input_responses")
            tally.response(record, source, f"input_responses_dropped.{reason}")
        if reason := _left_out(record, config):
            tally.prompt(record, f"prompts_left_out.{reason}")
        else:
            chosen.append((draws(record.prompt_id, config.seed).order, record.prompt_id, (record.file, record.line)))
    if config.max_prompts is None or len(chosen) <= config.max_prompts:
        return {place for _, _, place in chosen}
    chosen.sort()
    beyond = {place for _, _, place in chosen[config.max_prompts :]}
    for record, _ in reader.at(beyond):
        tally.prompt(record, "prompts_left_out.beyond_max_prompts")
    return {place for _, _, place in chosen[: config.max_prompts]}


def _left_out(record: ScoredPrompt, config: BuildConfig) -> str:
    """Why a prompt is not for this data set, whatever its responses are; "" where it is."""
    rule = config.rule_of(record.domain)
    fraction = config.sft_fraction if rule is None or rule.sft_fraction is None else rule.sft_fraction
    side = side_of(record.prompt_id, seed=config.seed, holdout=config.holdout, sft_fraction=fraction)
    if config.domains and record.domain not in config.domains:
        return "other_domain"
    if config.domain_rules and rule is None:
        return "no_rule_for_the_domain"
    if rule is not None and {"sft": rule.sft, "pair": rule.pair}.get(config.kind) == "none":
        return f"no_{config.kind}_of_the_domain"
    return "" if in_part(side, config.resolved_part) else "other_part"


def _rows(
    reader: RecordReader, wanted: set[tuple[str, int]], groups: GroupBuilder, progress: Progress | None
) -> Iterator[Row]:
    """Second pass: the groups, in the order of the input."""
    records = reader.at(wanted)
    done = 0
    while batch := list(islice(records, _PROMPTS_A_BATCH)):
        lines = {record.prompt_id: raw for record, raw in batch}
        for row in groups([record for record, _ in batch]):
            if isinstance(row, Rejected):
                _set_aside(reader, row.record, row.reason, lines[row.record.prompt_id])
            else:
                yield row
        done += len(batch)
        if progress is not None:
            progress(done, len(wanted))


def _set_aside(reader: RecordReader, record: ScoredPrompt, reason: str, raw: bytes) -> None:
    reader.bad(BadRecord(record.file, record.line, 1, f"{record.prompt_id}: {reason}"), raw)


def _write(rows: Iterable[Row], work: Path, kind: str) -> dict[str, Any]:
    """Stream the rows to disk, sort them, and sum them up for the manifest."""
    stream = work / "unsorted.arrow"
    writer = RowWriter(stream)
    ids, digests = [], []
    total: Counter[str] = Counter()
    largest_group = largest_sequence = 0
    domains: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        writer.append(row)
        ids.append(row.prompt_id)
        digests.append(row.digest())
        answers = [len(r) for r in row.responses]
        total.update(responses=len(answers), terms=len(row.members), tokens=row.tokens, prompt_tokens=len(row.prompt))
        total["tokens_unshared"] += len(row.prompt) * len(answers) + sum(answers)
        largest_group = max(largest_group, row.tokens)
        largest_sequence = max(largest_sequence, len(row.prompt) + max(answers))
        domains[row.domain] += 1
        sources.update(row.sources)
        for members, weight in zip(row.members, row.weights.tolist()):
            shares[row.sources[members[0]]].append(weight)
    writer.close()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    if ids:
        save_sorted(stream, order, work / GROUPS)
    stream.unlink()
    keys = ("responses", "terms", "tokens", "prompt_tokens", "tokens_unshared")
    return {
        "groups": len(ids),
        **{key: total[key] for key in keys},
        "max_group_tokens": largest_group,
        "max_sequence_tokens": largest_sequence,
        "groups_by_domain": dict(sorted(domains.items())),
        "responses_by_source": dict(sorted(sources.items())),
        # of each term, to the source of its first response; fsum: the same in every order of the input
        "weight_by_source": {source: math.fsum(weights) for source, weights in sorted(shares.items())},
        "data_digest": content_digest(kind, [digests[i] for i in order]),
    }


def _check_groups(config: BuildConfig, groups: GroupBuilder, kept: int) -> None:
    tokens, prompt_id = groups.longest_group
    counts = groups.tally.total
    if tokens and config.on_long_group == "refuse":
        number = counts["prompts_dropped.long_group"]
        raise DataError(
            f"{number} group(s) are longer than max_row_tokens = {config.max_row_tokens}; the longest, {prompt_id!r}, "
            f'has {tokens} tokens. Set max_row_tokens >= {tokens}, keep fewer responses (k), or on_long_group = "drop"'
        )
    if not kept:
        reasons = ", ".join(f"{key} {value}" for key, value in counts.items() if value) or "the input is empty"
        no_holdout = config.resolved_part == "eval" and not config.holdout
        hint = '; holdout is 0: set it, or part = "all"' if no_holdout else ""
        raise DataError(f"no group is left in part {config.resolved_part!r}: {reasons}{hint}")


def _all_counts(reader: RecordReader, tally: Tally) -> dict[str, int]:
    """Every count, by name. `prompts` is the sum of prompts_left_out.*, prompts_dropped.* and prompts_kept."""
    found = Counter({**tally.total, "bad_records": reader.error_count})
    found.update({f"input_{key}": value for key, value in reader.counts.items() if f"input_{key}" not in found})
    return {key: int(found[key]) for key in sorted(found) if found[key] or key == "bad_records"}


def max_positions(folder: Path) -> int | None:
    """max_position_embeddings of the model in a Hugging Face folder; None where its config.json does not say."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None  # the tokenizer refuses what it needs of it
    text = config.get("text_config") if isinstance(config, dict) else None
    for part in (config, text):
        found = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None


def _warnings(tokenizer: ChatTokenizer, tally: Tally, positions: int | None, longest: int) -> list[str]:
    found = []
    if tokenizer.template.depends_on_date:
        found.append("the chat template writes today's date into prompts: the same build gives other data tomorrow")
    if number := tally.total[BEYOND_POSITIONS]:
        found.append(
            f"{number} sequence(s), the longest of {longest} tokens, are longer than the model's "
            f"max_position_embeddings = {positions} in {tokenizer.folder / 'config.json'}: its positions beyond were "
            f"never trained; set max_length = {positions} or less"
        )
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("megafuse", "transformers", "tokenizers", "datasets", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
