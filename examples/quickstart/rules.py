"""Verifiable instructions: what each rule asks, how exactly a text obeys it, and the reward made of that.

A rule is a plain dict, as it stands in the data set's `meta.rules`: `{"kind": "bullets", "n": 3}`. Everything here is
deterministic and needs only the standard library, so that anyone can recompute every reward of `data.jsonl.gz`.

    reward = 0.7 * (share of the rules obeyed exactly) + 0.3 * (mean closeness) - penalties, clipped to [0, 1]

Closeness is a coarse grade in {0, 1/4, 1/2, 3/4, 1} of how near a text comes to a rule. It is coarse on purpose: it
separates "one capital letter too many" from "did not even try", while texts that differ only in noise tie. Penalties:
0.1 when cut off at the token limit, 0.1 for the same words again and again, 0.3 for fewer than four words (no answer at
all obeys "only capital letters" best). An empty text is worth 0.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = Mapping[str, Any]

EXACT_SHARE, CLOSE_SHARE = 0.7, 0.3
CUT_OFF, REPETITIVE, TOO_SHORT = 0.1, 0.1, 0.3

INSTRUCTIONS = {
    "lowercase": "Use only lowercase letters.",
    "uppercase": "Use only CAPITAL LETTERS.",
    "bullets": 'Answer with exactly {n} bullet points that start with "- ".',
    "start_with": 'Start with the word "{word}".',
    "end_with": 'End with the exact words "{phrase}"',
    "no_commas": "Do not use any commas.",
    "keywords": 'Use the words "{first}" and "{second}".',
    "quotes": "Put your whole answer in double quotes.",
    "json": 'Answer with a JSON object that has only the key "{key}".',
    "one_sentence": "Answer in one sentence of at most {n} words.",
}


def instruction(rule: Rule) -> str:
    """The sentence that asks for `rule` in a prompt."""
    return INSTRUCTIONS[rule["kind"]].format(**rule)


def exact(rule: Rule, text: str) -> bool:
    """Whether `text` (stripped, not empty) obeys `rule` to the letter."""
    return _EXACT[rule["kind"]](rule, text)


def closeness(rule: Rule, text: str) -> float:
    """How near `text` comes to `rule`: one of 0, 0.25, 0.5, 0.75, 1; exactly 1 where it is obeyed."""
    if exact(rule, text):
        return 1.0
    near = _NEAR[rule["kind"]](rule, text)
    return min(0.75, round(4 * max(0.0, near)) / 4)


def reward(rules: Sequence[Rule], text: str, finish_reason: str) -> float:
    """Score of one response in [0, 1], rounded to 4 digits; `finish_reason` is "stop" or "length"."""
    text = text.strip()
    if not text:
        return 0.0
    obeyed = sum(exact(rule, text) for rule in rules) / len(rules)
    near = sum(closeness(rule, text) for rule in rules) / len(rules)
    penalty = (
        CUT_OFF * (finish_reason != "stop") + REPETITIVE * is_repetitive(text) + TOO_SHORT * (len(text.split()) < 4)
    )
    return round(min(1.0, max(0.0, EXACT_SHARE * obeyed + CLOSE_SHARE * near - penalty)), 4)


def is_repetitive(text: str) -> bool:
    """Whether fewer than half of the text's word trigrams are different ones (only from 8 words up)."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:]))
    return len(words) >= 8 and len(set(trigrams)) < len(trigrams) / 2


def _words_without(text: str, banned: Callable[[str], bool]) -> float:
    """Share of the words with a letter that have no letter for which `banned` holds."""
    words = [word for word in text.split() if any(c.isalpha() for c in word)]
    return sum(not any(banned(c) for c in word) for word in words) / len(words) if words else 0.0


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _sentences(text: str) -> int:
    """Sentences that end in . ! or ?, plus one for a rest without an end; a number's point ends none."""
    return len(re.findall(r"[.!?]+[\"')]*(?=\s|$)", text)) + (re.search(r"[.!?][\"')]*$", text) is None)


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _json_only(rule: Rule, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == [rule["key"]] and bool(value[rule["key"]])


def _near_start(rule: Rule, text: str) -> float:
    return 0.5 if _has_word(" ".join(text.split()[:4]), rule["word"]) else 0.25 * _has_word(text, rule["word"])


def _near_end(rule: Rule, text: str) -> float:
    phrase, low = rule["phrase"].lower().rstrip("."), text.lower()
    if low.rstrip("\"'.!* ").endswith(phrase):
        return 0.75
    return 0.5 if phrase in low else 0.0


def _near_json(rule: Rule, text: str) -> float:
    return 0.25 * ("{" in text) + 0.25 * ("}" in text) + 0.25 * (f'"{rule["key"]}"' in text)


_EXACT: dict[str, Callable[[Rule, str], bool]] = {
    "lowercase": lambda rule, text: text == text.lower() and any(c.isalpha() for c in text),
    "uppercase": lambda rule, text: text == text.upper() and any(c.isalpha() for c in text),
    "bullets": lambda rule, text: len(_lines(text)) == rule["n"] and all(x.startswith("- ") for x in _lines(text)),
    "start_with": lambda rule, text: re.match(rf"{re.escape(rule['word'])}\b", text) is not None,
    "end_with": lambda rule, text: text.endswith(rule["phrase"]),
    "no_commas": lambda rule, text: "," not in text,
    "keywords": lambda rule, text: _has_word(text, rule["first"]) and _has_word(text, rule["second"]),
    "quotes": lambda rule, text: len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2,
    "json": _json_only,
    "one_sentence": lambda rule, text: _sentences(text) == 1 and len(text.split()) <= rule["n"],
}

_NEAR: dict[str, Callable[[Rule, str], float]] = {
    # Every text has mostly small letters, so only a text with few capitals is near: 1 word in 4 is already far.
    "lowercase": lambda rule, text: 1 - 4 * (1 - _words_without(text, str.isupper)),
    "uppercase": lambda rule, text: _words_without(text, str.islower),
    "bullets": lambda rule, text: (
        0.75 - abs(sum(re.match(r"([-*\u2022]|\d+[.)]) ?", x) is not None for x in _lines(text)) - rule["n"]) / 4
        if re.search(r"^\s*([-*\u2022]|\d+[.)])", text, re.MULTILINE)
        else 0.0
    ),
    "start_with": _near_start,
    "end_with": _near_end,
    "no_commas": lambda rule, text: 1 - text.count(",") / 4,
    "keywords": lambda rule, text: 0.5 * (_has_word(text, rule["first"]) + _has_word(text, rule["second"])),
    "quotes": lambda rule, text: 0.5 * (text[0] == '"') + 0.25 * (text[-1] == '"'),
    "json": _near_json,
    "one_sentence": lambda rule, text: 0.5 * (_sentences(text) == 1) + 0.5 * min(1, 2 - len(text.split()) / rule["n"]),
}
