"""A process that compares mathematics answers: `python -m megafuse.rewards.math_worker`, one JSON object a line.

In: `{"gold": text, "text": response}`. Out: `{"correct": bool, "answer": what was compared, "how": ...}`. It sets no
timeout: math-verify's own use SIGALRM, which works on a main thread only, and symbolic algebra may hang in C code where
no signal is served. Whoever started this process kills it instead.
"""

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

from megafuse.rewards.answers import final_answer, same_number

MEMORY_BYTES = 4 << 30


def grade(gold: str, text: str) -> dict[str, Any]:
    """Whether the final answer of `text` equals `gold`. Needs math-verify where one is not a plain number."""
    answer = final_answer(text)
    if answer is not None:
        equal = same_number(gold, answer)
        if equal is not None:
            return {"correct": equal, "answer": answer, "how": "number"}
    from math_verify import parse, verify

    reference = parse(f"${_formula(gold)}$", parsing_timeout=None) or parse(gold, parsing_timeout=None)
    shown = answer if answer is not None else text
    for candidate in _candidates(answer) if answer is not None else [text]:
        found = parse(candidate, parsing_timeout=None)
        if found and verify(reference, found, timeout_seconds=None):
            return {"correct": True, "answer": shown[-200:], "how": "math-verify"}
    return {
        "correct": False,
        "answer": shown[-200:],
        "how": "math-verify" if answer is not None else "no marked answer",
    }


def _formula(text: str) -> str:
    """LaTeX of what people type: roots, pi, a star between factors."""
    text = re.sub(
        r"\u221a\(?([\w.]+)\)?|(?<!\\)\bsqrt\(([^()]*)\)",
        lambda m: rf"\sqrt{{{m[1] or m[2]}}}",
        text.replace("$", ""),
    )
    return text.replace("\u03c0", "\\pi ").replace("*", "\\cdot ")


def _candidates(answer: str) -> list[str]:
    """How a marked answer may be read: as a formula; and, where it is a sentence, as a text with a number in it."""
    formula = _formula(answer)
    # not as a text where that would take one number out of a formula, a time or a list
    sentence = re.search(r"[A-Za-z]{3,}", answer) and not re.search(r"\\|sqrt|\d:\d|[\^_]", answer)
    return [f"${formula}$", answer] if sentence else [f"${formula}$"]


def main() -> None:
    """Serve until standard input ends, or the starter kills this process; Ctrl-C is the starter's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # math-verify warns at each call that it has no timeout of its own
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = grade(request["gold"], request["text"])
        except Exception as e:  # a parser of free text fails in many ways; the response then has no verdict
            verdict = {"correct": None, "answer": None, "how": f"error: {type(e).__name__}"}
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
