"""`megafuse prompts`: rows of a published set to prompts, one of a kind, with the count of every step."""

import difflib
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafuse.config.prompts import PromptsConfig
from megafuse.data.chunks import Record, read_raw
from megafuse.data.prompt_recipes import RECIPES, Language, PromptRecipe, Row
from megafuse.errors import ConfigError, DataError
from megafuse.observe.manifest import atomic_file, utc_now, versions, write_json_atomic

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class PromptsResult:
    """The counts, in the order of the steps; each but the first and last is a number of rows that went."""

    counts: dict[str, int]


def make_prompts(config: PromptsConfig) -> PromptsResult:
    """Write the prompts of a set.

    Raises:
        ConfigError: no such recipe, or nothing that can be read at `data`.
        DataError: a column is missing, or nothing is left.
    """
    recipe = recipe_of(config.recipe)
    counts: Counter[str] = Counter(rows=0)
    found: dict[str, Record] = {}
    given: dict[str, list[str]] = {}
    excluded = {key for path in config.exclude for key in map(_key, _texts(path))}
    for row in _rows(config, recipe):
        counts["rows"] += 1
        reason, text = _refused(config, recipe, row)
        key = _key(text) if not reason else ""
        if not reason and key in excluded:
            reason = "excluded"
        if not reason and key in found:
            reason = "duplicate"
            _add_given(config, recipe, row, given[key])
        if not reason:
            record = _record(config.recipe, recipe, row, text, key)
            if recipe.tests is not None and record.get("tests") is None:
                reason = "without_tests"
            elif recipe.gold is not None and not str(record.get("gold") or "").strip():
                reason = "without_gold"
            else:
                found[key], given[key] = record, []
                _add_given(config, recipe, row, given[key])
        if reason:
            counts[f"dropped.{reason}"] += 1
    order = list(found)
    if config.max_prompts is not None and len(order) > config.max_prompts:
        counts["dropped.beyond_max_prompts"] = len(order) - config.max_prompts
        chosen = set(
            sorted(order, key=lambda k: hashlib.sha256(f"{config.seed}:{k}".encode()).digest())[: config.max_prompts]
        )
        order = [key for key in order if key in chosen]
    if not order:
        shown = ", ".join(f"{name} {number}" for name, number in counts.items())
        raise DataError(f"no prompt is left of {config.data or recipe.hub}: {shown}")
    counts["prompts"] = len(order)
    _write(config.output, (found[key] for key in order))
    if config.given is not None and recipe.given is not None:
        counts["given_responses"] = _write_given(config.given, recipe.given[0], [(found[k], given[k]) for k in order])
    facts = {
        "recipe": config.recipe,
        "hub": recipe.hub,
        "counts": dict(counts),
        "config": config.model_dump(mode="json"),
    }
    manifest = config.output.with_name(f"{config.output.name}.manifest.json")
    write_json_atomic(manifest, {**facts, "created": utc_now(), "versions": versions()})
    return PromptsResult(dict(counts))


def recipe_of(name: str) -> PromptRecipe:
    """The recipe of that name. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(RECIPES)}"
        raise ConfigError(f"recipe = {name!r} is not known; {hint}")
    return RECIPES[name]


def _rows(config: PromptsConfig, recipe: PromptRecipe) -> Iterator[Row]:
    import datasets

    data: Any
    try:
        if config.data is None:
            data = datasets.load_dataset(recipe.hub, split=config.split)
        elif any((config.data / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(config.data))
            data = data[config.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = _files(config.data)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as e:
        raise ConfigError(f"data: {config.data or recipe.hub} cannot be read: {type(e).__name__}: {e}") from e
    missing = [name for name in recipe.columns if name not in data.column_names]
    if missing:
        raise DataError(
            f"{config.data or recipe.hub} is not {recipe.hub}: it has no column {', '.join(missing)}, but "
            f"{', '.join(data.column_names)}"
        )
    yield from data


def _files(folder: Path) -> Any:
    """All files of one format in a folder, read without a cache of their own."""
    import datasets

    for suffix, kind in _FORMATS.items():
        if paths := sorted(folder.rglob(f"*{suffix}")):
            reader = {"json": datasets.Dataset.from_json, "csv": datasets.Dataset.from_csv}
            return reader.get(kind, datasets.Dataset.from_parquet)([str(p) for p in paths], keep_in_memory=True)
    raise ConfigError(f"data: {folder} holds no {', '.join(_FORMATS)} file and no saved data set")


def _refused(config: PromptsConfig, recipe: PromptRecipe, row: Row) -> tuple[str, str]:
    """(why a row is no prompt, or "", its text)."""
    text = recipe.text(row)
    if not isinstance(text, str) or not text.strip():
        return "empty", ""
    text = text.strip()
    if not config.min_chars <= len(text) <= config.max_chars:
        return "length", text
    if config.check_language and language_of(text) != recipe.language:
        return "language", text
    return ("" if recipe.keep(row, text) else recipe.why_not), text


def language_of(text: str) -> Language | None:
    """`zh` or `en` by script, None for anything else: a coarse filter that needs no model.

    At least 2 of 10 letters are Chinese characters (code and names may stand between), without Japanese or Korean
    script; or 9 of 10 letters are unaccented Latin ones.
    """
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return None
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    other = sum("\u3040" <= c <= "\u30ff" or "\uac00" <= c <= "\ud7af" for c in letters)
    if chinese >= 0.2 * len(letters) and not other:
        return "zh"
    return "en" if sum(c.isascii() for c in letters) >= 0.9 * len(letters) else None


def _key(text: str) -> str:
    """What makes two prompts the same: their letters and digits, whatever their case, width and punctuation."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"\s+", " ", plain).strip()
    return hashlib.sha256(words.encode()).hexdigest()


def _texts(path: Path) -> Iterable[str]:
    for record in read_raw(path, "prompts"):
        messages = record.get("messages")
        yield messages[-1]["content"] if messages else record["prompt"]
        if isinstance(record.get("question"), str):  # what a benchmark's prompt asks, without its instructions
            yield record["question"]


def _record(name: str, recipe: PromptRecipe, row: Row, text: str, key: str) -> Record:
    record: Record = {
        "prompt_id": f"{name}-{key[:16]}", "prompt": text, "domain": recipe.domain, "dataset": recipe.hub.split("/")[-1]
    }  # fmt: skip
    if recipe.gold is not None:
        record["gold"] = recipe.gold(row)
    if recipe.tests is not None:
        record["tests"] = recipe.tests(row)
    return record


def _add_given(config: PromptsConfig, recipe: PromptRecipe, row: Row, into: list[str]) -> None:
    if recipe.given is None or config.given is None or len(into) >= config.given_per_prompt:
        return
    text = recipe.given[1](row)
    if isinstance(text, str) and text.strip() and text not in into:
        into.append(text)


def _write(path: Path, records: Iterable[Record]) -> None:
    with atomic_file(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _write_given(path: Path, source: str, pairs: Sequence[tuple[Record, list[str]]]) -> int:
    rows = [
        {**record, "responses": [{"source": source, "model": source, "text": text} for text in texts]}
        for record, texts in pairs
        if texts
    ]
    _write(path, rows)
    return sum(len(texts) for _, texts in pairs)
