"""The order of responses of one prompt, written anew for tests: by one sort key a response, over plain dictionaries."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Answer = Mapping[str, Any]  # a response as it stands in a file


def sha(seed: int, *parts: Any) -> str:
    """Hash that orders equal rewards."""
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).hexdigest()


def falling(answers: Sequence[Answer], prompt_id: str, seed: int = 0) -> list[int]:
    """Indices in falling reward; of equal rewards the first of every source, then the second of every source, ..."""

    def own(i: int) -> tuple[str, int]:
        keys = ("source", "text", "model", "finish_reason", "correct")
        return sha(seed, prompt_id, *(answers[i].get(key) for key in keys)), i

    def key(i: int) -> tuple[float, int, str]:
        alike = [
            j
            for j, other in enumerate(answers)
            if (other["source"], other["reward"]) == (answers[i]["source"], answers[i]["reward"])
        ]
        turn = sorted(alike, key=own).index(i)
        return -answers[i]["reward"], turn, sha(seed, prompt_id, answers[i]["source"])

    return sorted(range(len(answers)), key=key)


def best_and_worst(answers: Sequence[Answer], prompt_id: str, seed: int = 0) -> tuple[int, int]:
    """The first of the highest and the first of the lowest rewards of some responses of one source."""
    order = falling(answers, prompt_id, seed)
    lowest = answers[order[-1]]["reward"]
    return order[0], next(i for i in order if answers[i]["reward"] == lowest)
