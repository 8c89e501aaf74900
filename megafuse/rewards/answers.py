"""The final answer of a response to a mathematics prompt, found the way people write it, and a first comparison.

Looked for in this order: the last `"answer": ...` of a JSON answer, the last `\\boxed{...}`, what follows `####`, what
follows the last "answer is". Where there is none of these, math-verify searches the whole text.
"""

import json
import re
from decimal import Decimal, InvalidOperation

_JSON_ANSWER = re.compile(r'"answer"\s*:\s*("(?:[^"\\]|\\.)*"|-?[\d.,]+(?:[eE][+-]?\d+)?|true|false)', re.DOTALL)
_HASHES = re.compile(r"####\s*(.+)")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*(.+?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
_UNITS = re.compile(r"\\text\{[^}]*\}|\\(?:dollars?|degree|circ|%|!|,|;| )|[$%\u00b0\u20ac\u00a3\s]")


def final_answer(text: str) -> str | None:
    """The final answer as it is written; None where the response does not mark one."""
    found = _JSON_ANSWER.findall(text)
    if found:
        return _unquoted(found[-1])
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_HASHES, _ANSWER_IS):
        matches = pattern.findall(text)
        if matches and matches[-1].strip():
            return str(matches[-1]).strip().strip("*")
    return None


def _unquoted(raw: str) -> str:
    if not raw.startswith('"'):
        return raw
    inner = raw[1:-1]
    if "\\" not in inner:
        return inner.strip()
    # LaTeX inside JSON is often not escaped: "\frac" reads as a form feed and "rac", so it is kept as it stands
    if re.search(r"(?<!\\)\\(?!\\)[A-Za-z]{2}", inner):
        return inner.strip()
    try:
        return str(json.loads(raw)).strip()
    except ValueError:
        return inner.strip()


def last_boxed(text: str) -> str | None:
    """What the last balanced `\\boxed{...}` or `\\fbox{...}` holds."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i].strip()
    return None


def as_number(text: str) -> Decimal | None:
    """A plain decimal number, thousands separators, currency and percent signs aside; None for anything else."""
    bare = _UNITS.sub("", text).rstrip(".")
    if not bare or not _NUMBER.fullmatch(bare):
        return None
    try:
        return Decimal(bare.replace(",", ""))
    except InvalidOperation:
        return None


def same_number(gold: str, answer: str) -> bool | None:
    """Whether two plain numbers are equal; None where one of them is not a plain number."""
    one, two = as_number(gold), as_number(answer)
    return None if one is None or two is None else one == two
