"""Where in a line of JSON a value stands: turns a field path into the column of an error message."""

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def dotted(path: tuple[str | int, ...]) -> str:
    """The path as messages write it: `responses[3].reward`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def column(text: str, path: tuple[str | int, ...]) -> int:
    """The 1-based column of the value at `path`, e.g. `("responses", 3, "reward")`.

    Where a key or an index is missing, the column of the deepest container that exists. `text` must be valid JSON. A
    repeated key counts by its last occurrence, as `json.loads` reads it. Walking costs one decode of the line, so this
    is for errors only.
    """
    start = _skip(text, 0)
    for step in path:
        found = None
        if text[start] in "{[":
            for key, value_start in _children(text, start):
                if key == step:
                    found = value_start
        if found is None:
            break
        start = found
    return start + 1


def _skip(text: str, i: int) -> int:
    match = _SPACE.match(text, i)
    return match.end() if match else i


def _children(text: str, start: int) -> Iterator[tuple[str | int, int]]:
    """(key or index, position of the value) of each member of the object or array that starts at `start`."""
    is_object = text[start] == "{"
    i, index = _skip(text, start + 1), 0
    while text[i] not in "}]":
        key: str | int = index
        if is_object:
            key, i = _DECODER.raw_decode(text, i)
            i = _skip(text, _skip(text, i) + 1)  # past the colon
        yield key, i
        _, i = _DECODER.raw_decode(text, i)
        i, index = _skip(text, i), index + 1
        if text[i] == ",":
            i = _skip(text, i + 1)
