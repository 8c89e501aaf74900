"""Reader of the public file formats: one JSON object a line, `.jsonl` or gzip of it, streamed.

    {"prompt_id", "messages": [{"role", "content"}..] | "prompt", "domain", "dataset"?, "gold"?, "tests"?,
     "responses": [{"source", "text", "reward", "correct"?, "model"?, "finish_reason"?}..]}

A line that training must not see is a *bad record*, reported as `file:line:col: reason`. Keys that are not named here
are ignored. A byte order mark, CRLF line ends and blank lines are accepted. Where a record has `messages` and `prompt`,
`messages` count.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from megafuse.data.jsonpos import column, dotted
from megafuse.errors import ConfigError

Form = Literal["prompts", "responses", "scored"]


@dataclass(frozen=True)
class Response:
    """One answer of one source model. `reward` is None only where the form of the file is not `scored`."""

    source: str
    text: str
    reward: float | None = None
    correct: bool | None = None
    model: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class ScoredPrompt:
    """One line of a file: a prompt and its responses, in the order of the file."""

    prompt_id: str
    messages: tuple[dict[str, str], ...]  # of {"role", "content"}; the last one is not from the assistant
    domain: str  # "unknown" where the record has none
    responses: tuple[Response, ...]
    gold: Any = None
    tests: Any = None
    file: str = ""
    line: int = 0
    dataset: str = ""  # where the prompt comes from; "" where the record does not say
    dropped: tuple[tuple[str, str], ...] = ()  # (source, reason) of each bad response that was dropped


@dataclass(frozen=True)
class BadRecord:
    """One refused line."""

    file: str
    line: int  # 1-based
    col: int  # 1-based, in characters (in bytes where the line is not UTF-8)
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}: {self.reason}"


@dataclass(frozen=True)
class Rules:
    """What a record must hold, and what becomes of responses that do not."""

    form: Form = "scored"
    reward_field: str = "reward"
    drop_bad_responses: bool = False  # else a response without text or without a finite reward is an error

    def __post_init__(self) -> None:
        if not self.reward_field:
            raise ConfigError("reward_field must name a key of the responses, got ''")


class RecordError(Exception):
    """Why a line is refused, and where: raised by `parse_record`, turned into a `BadRecord` by the reader."""

    def __init__(self, reason: str, col: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.col = reason, col


class _FieldError(Exception):
    def __init__(self, path: tuple[str | int, ...], reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


Path = tuple[str | int, ...]


def parse_record(raw: bytes, rules: Rules, *, file: str = "", line: int = 0) -> tuple[ScoredPrompt, dict[str, int]]:
    """One line to a record, and the number of responses that were dropped by reason.

    Raises:
        RecordError: with the column, if the line is not one acceptable record.
    """
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        hint = "; it looks like UTF-16: convert it with iconv" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise RecordError(f"not UTF-8: {e.reason}, byte 0x{raw[e.start]:02x}{hint}", e.start + 1) from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as e:
        raise RecordError(f"not JSON: {e.msg}", e.colno) from None
    except (ValueError, RecursionError) as e:  # integers of > 4300 digits, a thousand nested brackets
        raise RecordError(f"not readable as JSON: {e}") from None
    try:
        return _record(record, rules, file, line)
    except _FieldError as e:
        where = dotted(e.path)
        raise RecordError(f"{where}: {e.reason}" if where else e.reason, column(text, e.path)) from None


def _record(record: Any, rules: Rules, file: str, line: int) -> tuple[ScoredPrompt, dict[str, int]]:
    if not isinstance(record, dict):
        raise _FieldError((), f"must be an object, got {_kind(record)}")
    prompt_id = _string(record, ("prompt_id",))
    messages = _messages(record)
    domain = _string(record, ("domain",)) if record.get("domain") is not None else "unknown"
    dataset = _string(record, ("dataset",), empty=True) if record.get("dataset") is not None else ""
    responses: list[Response] = []
    dropped: list[tuple[str, str]] = []
    if rules.form != "prompts":
        items = record.get("responses")
        if not isinstance(items, list):
            raise _FieldError(("responses",), f"must be a list, got {_kind(items, 'responses' in record)}")
        if not items:
            raise _FieldError(("responses",), "must hold at least one response, got none")
        for i, item in enumerate(items):
            response = _response(item, ("responses", i), rules)
            if isinstance(response, Response):
                responses.append(response)
            else:
                dropped.append((item["source"], response))
    return ScoredPrompt(
        prompt_id=prompt_id,
        messages=messages,
        domain=domain,
        responses=tuple(responses),
        gold=record.get("gold"),
        tests=record.get("tests"),
        file=file,
        line=line,
        dataset=dataset,
        dropped=tuple(dropped),
    ), dict(Counter(reason for _, reason in dropped))


def _messages(record: dict[str, Any]) -> tuple[dict[str, str], ...]:
    items = record.get("messages")
    if items is None:
        if record.get("prompt") is None:
            raise _FieldError((), "has neither 'messages' nor 'prompt'")
        return ({"role": "user", "content": _string(record, ("prompt",), space=False)},)
    if not isinstance(items, list) or not items:
        raise _FieldError(("messages",), f"must be a list of at least one message, got {_kind(items)}")
    messages = []
    for i, item in enumerate(items):
        at: Path = ("messages", i)
        if not isinstance(item, dict):
            raise _FieldError(at, f"must be an object, got {_kind(item)}")
        role = _string(item, (*at, "role"))
        # only the last message must say something: an empty system message is legitimate
        last = i == len(items) - 1
        messages.append({"role": role, "content": _string(item, (*at, "content"), space=not last, empty=not last)})
    if messages[-1]["role"] == "assistant":
        at = ("messages", len(messages) - 1)
        raise _FieldError(at, "the last message is from the assistant: answers belong into 'responses'")
    return tuple(messages)


def _response(item: Any, at: Path, rules: Rules) -> Response | str:
    """The response, or the reason for which it is dropped."""
    if not isinstance(item, dict):
        raise _FieldError(at, f"must be an object, got {_kind(item)}")
    source = _string(item, (*at, "source"))
    text = _string(item, (*at, "text"), empty=True)
    correct = item.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise _FieldError((*at, "correct"), f"must be true, false or null, got {_kind(correct)}")
    model, finish = (_string(item, (*at, key)) if item.get(key) is not None else None for key in _OPTIONAL)
    reward, problem, path = None, "", (*at, "text")
    if not text or text.isspace():
        problem, reason = "empty_text", "is empty"
    if rules.form == "scored" and not problem:
        path = (*at, rules.reward_field)
        reward, problem, reason = _reward(item, path)
    if not problem:
        return Response(source, text, reward, correct, model, finish)
    if rules.drop_bad_responses:
        return problem
    raise _FieldError(path, f'{reason} (source {source!r}); on_bad_response = "drop" leaves such responses out')


_OPTIONAL = ("model", "finish_reason")


def _reward(item: dict[str, Any], path: Path) -> tuple[float | None, str, str]:
    """(reward, problem, reason): the problem is empty where the reward is a finite number."""
    value = item.get(str(path[-1]))
    if value is None:
        others = sorted(k for k, v in item.items() if k.startswith("reward") and k != path[-1])
        hint = f"; the response has {', '.join(others)}: set reward_field" if others else ""
        return None, "missing_reward", f"is missing or null{hint}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _FieldError(path, f"must be a number, got {_kind(value)}")
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        return None, "nonfinite_reward", f"must be finite, got {reward}"
    return reward, "", ""


def _string(item: dict[str, Any], path: Path, *, space: bool = False, empty: bool = False) -> str:
    """The string at the end of `path`; `empty` allows "", `space` allows white space only."""
    key = str(path[-1])
    value = item.get(key)
    if not isinstance(value, str):
        raise _FieldError(path, f"must be a string, got {_kind(value, key in item)}")
    if not empty and not value:
        raise _FieldError(path, "must not be empty")
    if not (space or empty) and value.isspace():
        raise _FieldError(path, "must not be white space only")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise _FieldError(path, f"holds half of a surrogate pair, {value[e.start]!a}: not text") from None
    return value


def _kind(value: Any, present: bool = True) -> str:
    if not present:
        return "nothing: the key is missing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    name = names.get(type(value), "a number")
    return f"{name}, {value!r:.40}" if isinstance(value, str | int | float) else name
