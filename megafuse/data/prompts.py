"""`megafuse prompts`: rows of a published set to prompts, one of a kind, with the count of every step."""

import difflib
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafuse.config.prompts import PromptsConfig
from megafuse.data.chunks import Record, output_file, read_raw
from megafuse.data.prompt_recipes import RECIPES, Language, PromptRecipe, Row
from megafuse.data.reader import check_output
from megafuse.errors import ConfigError, DataError
from megafuse.observe.manifest import utc_now, versions, write_json_atomic

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = "train|training|validation|valid|val|dev|test|testing|eval|evaluation"
_SAME = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}


@dataclass(frozen=True)
class PromptsResult:
    """The counts, in the order of the steps; each but the first and last is a number of rows that went."""

    counts: dict[str, int]
    files: list[str]  # what was read; empty where `datasets` took the set from the hub or a saved one


def make_prompts(config: PromptsConfig) -> PromptsResult:
    """Write the prompts of a set.

    Raises:
        ConfigError: no such recipe, nothing that can be read at `data`, no such split, or an output among the inputs.
        DataError: a column is missing, or nothing is left.
    """
    recipe = recipe_of(config.recipe)
    counts: Counter[str] = Counter(rows=0)
    found: dict[str, Record] = {}
    given: dict[str, list[str]] = {}
    data, files = _load(config, recipe)
    excluded = {key for path in config.exclude for key in map(_key, _texts(path))}
    for row in data:
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
        "files": files,
        "counts": dict(counts),
        "config": config.model_dump(mode="json"),
    }
    write_json_atomic(_manifest(config), {**facts, "created": utc_now(), "versions": versions()})
    return PromptsResult(dict(counts), files)


def recipe_of(name: str) -> PromptRecipe:
    """The recipe of that name. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(RECIPES)}"
        raise ConfigError(f"recipe = {name!r} is not known; {hint}")
    return RECIPES[name]


def _load(config: PromptsConfig, recipe: PromptRecipe) -> tuple[Iterable[Row], list[str]]:
    """The rows of the set, and the files they are in."""
    import datasets

    data: Any
    files: list[Path] = []
    outputs = {"output": config.output, "manifest": _manifest(config)} | (
        {"given": config.given} if config.given else {}
    )
    for field, output in outputs.items():
        check_output(output, config.exclude, field=field)
    if config.given is not None and config.given.resolve() in (config.output.resolve(), _manifest(config).resolve()):
        raise ConfigError(f"given = {config.given} is another output of this command: choose another name")
    saved = ("dataset_info.json", "dataset_dict.json")
    try:
        if config.data is None:
            data = datasets.load_dataset(recipe.hub, split=config.split or "train")
        elif any((config.data / name).exists() for name in saved):
            for field, output in outputs.items():
                check_output(output, (p for p in config.data.rglob("*") if p.is_file()), field=field)
            data = datasets.load_from_disk(str(config.data))
            if isinstance(data, datasets.DatasetDict):
                data = data[config.split or "train"]
            elif config.split is not None and str(data.split) != config.split:
                raise ConfigError(f"split: {config.data} holds one set, of split {data.split}: not {config.split!r}")
        else:
            files = _files(config.data, config.split, outputs)
            kind = _FORMATS[files[0].suffix]
            reader = {"json": datasets.Dataset.from_json, "csv": datasets.Dataset.from_csv}
            # without a cache of their own
            data = reader.get(kind, datasets.Dataset.from_parquet)([str(p) for p in files], keep_in_memory=True)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as e:
        raise ConfigError(f"data: {config.data or recipe.hub} cannot be read: {type(e).__name__}: {e}") from e
    missing = [name for name in recipe.columns if name not in data.column_names]
    if missing:
        raise DataError(
            f"{config.data or recipe.hub} is not {recipe.hub}: it has no column {', '.join(missing)}, but "
            f"{', '.join(data.column_names)}"
        )
    return data, [str(path) for path in files]


def _files(data: Path, split: str | None, outputs: Mapping[str, Path]) -> list[Path]:
    """The files to read, of one format and one split; no output may be, or become, one of them."""
    if not data.exists():
        raise ConfigError(f"data: {data} does not exist")
    folder = data.parent if data.is_file() else data
    there = [data] if data.is_file() else sorted(p for p in data.rglob("*") if p.is_file())
    files = _selected(folder, there, split)
    for field, output in outputs.items():
        check_output(output, files, field=field)
        if data.is_dir() and output.resolve().is_relative_to(data.resolve()):
            inside = data / output.resolve().relative_to(data.resolve())
            if inside in _selected(folder, [*files, inside], split):
                raise ConfigError(f"{field} = {output} would be read as a part of {data} the next time: choose another")
    return files


def _selected(folder: Path, there: Sequence[Path], split: str | None) -> list[Path]:
    for suffix in _FORMATS:
        if paths := [p for p in there if p.suffix == suffix]:
            break
    else:
        raise ConfigError(f"data: {folder} holds no {', '.join(_FORMATS)} file and no saved data set")
    names = {path: split_of(path.relative_to(folder)) for path in paths}
    wanted = _SAME.get(split or "train", split or "train")
    for exact in (True, False):
        part = re.compile(re.escape(wanted) + ("$" if exact else "[-_.]"))
        if found := [path for path, name in names.items() if part.match(name)]:
            return found
    unnamed = [path for path, name in names.items() if not name]
    if split is None and (unnamed or len(paths) == 1):
        return unnamed or paths
    known = ", ".join(sorted({name for name in names.values() if name}))
    hint = f"they name {known}" if known else "they name none; leave `split` out to read them all"
    raise ConfigError(f"split: no file in {folder} is named for the split {wanted!r}: {hint}")


def split_of(path: Path) -> str:
    """The split that a file's name (`train-00000-of-00002.parquet`, `gsm8k_test.jsonl`) or folder tells, or ""."""
    shard = r"([-_.]\d+)?([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?$"
    for name in (re.sub(shard, "", path.stem), *reversed(path.parent.parts)):
        if re.fullmatch(rf"({_SPLITS})([-_.].+)?", name):
            return _SAME.get(name, name)
        if last := re.fullmatch(rf".+[-_.]({_SPLITS})", name):
            return _SAME.get(last[1], last[1])
    return ""


def _manifest(config: PromptsConfig) -> Path:
    return config.output.with_name(f"{config.output.name}.manifest.json")


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
    with output_file(path) as file:
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
