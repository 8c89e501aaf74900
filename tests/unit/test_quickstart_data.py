"""The quick start's data set: its rules on hand-written texts, its prompts, and that its rewards are what rules say."""

import gzip
import hashlib
import importlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    """A module of the example folder, which is no package: its scripts import each other by bare name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


rules, prompts = load("rules"), load("prompts")


@pytest.fixture(scope="module")
def data() -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(FOLDER / "data.jsonl.gz", "rt", encoding="utf-8")]


BULLETS = {"kind": "bullets", "n": 2}
START = {"kind": "start_with", "word": "Well"}
END = {"kind": "end_with", "phrase": "The end."}
WORDS = {"kind": "keywords", "first": "river", "second": "golden"}
JSON = {"kind": "json", "key": "fact"}
SENTENCE = {"kind": "one_sentence", "n": 8}


@pytest.mark.parametrize(
    ("rule", "text", "closeness"),
    [
        ({"kind": "lowercase"}, "cats are small, 9 in 10.", 1.0),
        ({"kind": "lowercase"}, "Cats are small animals with very soft fur.", 0.5),
        ({"kind": "lowercase"}, "Cats Are Small.", 0.0),
        ({"kind": "lowercase"}, "12 34 56 78", 0.0),
        ({"kind": "uppercase"}, "CATS ARE SMALL, 9 IN 10.", 1.0),
        ({"kind": "uppercase"}, "CATS ARE SMALL animals.", 0.75),
        ({"kind": "uppercase"}, "CATS ARE SMALL AND SOFT AND QUIET AND VERY clean.", 0.75),
        ({"kind": "uppercase"}, "cats are small", 0.0),
        (BULLETS, "- cats\n- dogs", 1.0),
        (BULLETS, "- cats\n\n- dogs", 1.0),
        (BULLETS, "* cats\n* dogs", 0.75),
        (BULLETS, "Here:\n- cats\n- dogs", 0.75),
        (BULLETS, "- cats\n- dogs\n- owls", 0.5),
        (BULLETS, "Cats:\n- dogs", 0.5),
        (BULLETS, "1. cats\n2. dogs\n3. owls\n4. bees", 0.25),
        (BULLETS, "Cats and dogs.", 0.0),
        (START, "Well, cats are small.", 1.0),
        (START, "Well cats are small.", 1.0),
        (START, "Wellness for cats.", 0.0),
        (START, "well cats are small.", 0.5),
        (START, "Cats are very small but eat well.", 0.25),
        (END, "Cats are small. The end.", 1.0),
        (END, 'Cats are small. "The end"', 0.75),
        (END, "The end. Cats are small.", 0.5),
        (END, "Cats are small.", 0.0),
        ({"kind": "no_commas"}, "Cats are small.", 1.0),
        ({"kind": "no_commas"}, "Cats, who are small.", 0.75),
        ({"kind": "no_commas"}, "Cats, dogs, owls, bees, and ants.", 0.0),
        (WORDS, "A Golden cat at the river.", 1.0),
        (WORDS, "A golden cat at the riverside.", 0.5),
        (WORDS, "A cat.", 0.0),
        ({"kind": "quotes"}, '"Cats are small."', 1.0),
        ({"kind": "quotes"}, '"Cats are small.', 0.5),
        ({"kind": "quotes"}, '"Cats" and "dogs"', 0.75),
        ({"kind": "quotes"}, "Cats are small.", 0.0),
        ({"kind": "quotes"}, '""', 0.75),
        (JSON, '{"fact": "Cats are small."}', 1.0),
        (JSON, '{\n"fact": ["small"]\n}', 1.0),
        (JSON, '```json\n{"fact": "Cats are small."}\n```', 0.75),
        (JSON, '{"fact": "small", "more": 1}', 0.75),
        (JSON, '{"fact": ""}', 0.75),
        (JSON, '{"note": "Cats', 0.25),
        (JSON, "Cats are small.", 0.0),
        (SENTENCE, "Cats are small animals.", 1.0),
        (SENTENCE, "Cats weigh 4.5 kilograms", 1.0),
        (SENTENCE, "Cats are small. They purr.", 0.5),
        (SENTENCE, "Cats are small animals that people like to keep at home.", 0.75),
    ],
)
def test_closeness_on_hand_written_texts(rule: dict[str, Any], text: str, closeness: float) -> None:
    assert rules.closeness(rule, text) == closeness
    assert rules.exact(rule, text) == (closeness == 1.0)


def test_reward_adds_up_by_hand() -> None:
    both = [{"kind": "no_commas"}, {"kind": "lowercase"}]
    assert rules.reward(both, "cats are small animals", "stop") == 1.0
    assert rules.reward(both, "  cats are small animals\n", "length") == 0.9
    # one of two exact: 0.7 / 2; closeness (1 + 0.75) / 2 for one comma
    assert rules.reward(both, "cats, who are small", "stop") == pytest.approx(0.35 + 0.3 * 0.875, abs=1e-4)
    assert rules.reward(both, "cats", "stop") == 0.7  # too short to be an answer
    assert rules.reward(both, " \n", "stop") == 0.0
    assert rules.reward(both, "so it is " * 6, "stop") == 0.9  # goes round in circles
    assert rules.reward([{"kind": "lowercase"}], "Cats Are", "length") == 0.0  # clipped, not negative


def test_prompts_follow_from_the_seed_and_examples_obey_their_rules() -> None:
    made = prompts.make_prompts()
    assert made == prompts.make_prompts()
    assert len({prompt["prompt"] for prompt in made}) == len(made) == prompts.COUNT
    kinds = Counter(rule["kind"] for prompt in made for rule in prompt["meta"]["rules"])
    assert set(kinds) == set(rules.INSTRUCTIONS)
    assert min(kinds.values()) >= 15
    for prompt in made:
        for topic in prompts.FACTS:
            text = prompts.perfect_answer(prompt["meta"]["rules"], topic)
            assert rules.reward(prompt["meta"]["rules"], text, "stop") == 1.0, (prompt["prompt"], text)
        shown = [message["role"] for message in prompts.examples(prompt, 2)]
        assert shown == ["user", "assistant"] * 2


def test_the_shipped_rewards_are_what_the_rules_say(data: list[dict[str, Any]]) -> None:
    for line in data:
        for response in line["responses"]:
            again = rules.reward(line["meta"]["rules"], response["text"], response["finish_reason"])
            assert again == response["reward"], (line["prompt_id"], response)


def test_the_shipped_prompts_are_the_generated_ones(data: list[dict[str, Any]]) -> None:
    shipped = [{key: value for key, value in line.items() if key != "responses"} for line in data]
    assert shipped == prompts.make_prompts()
    assert [line["prompt_id"] for line in data] == sorted(line["prompt_id"] for line in data)


def test_every_source_answers_every_prompt_and_most_groups_have_a_gap(data: list[dict[str, Any]]) -> None:
    gaps = defaultdict(list)
    for line in data:
        groups = defaultdict(list)
        for response in line["responses"]:
            assert set(response) == {"source", "model", "text", "reward", "finish_reason"}
            assert response["finish_reason"] in ("stop", "length")
            groups[response["source"]].append(response["reward"])
        assert len(groups) == 4 and {len(group) for group in groups.values()} == {4}
        for source, group in groups.items():
            gaps[source].append(max(group) - min(group))
    for source, values in gaps.items():
        assert sum(gap == 0 for gap in values) / len(values) < 0.45, source


def test_the_file_is_small_and_reads_the_same_everywhere() -> None:
    raw = (FOLDER / "data.jsonl.gz").read_bytes()
    assert len(raw) < 1_500_000
    assert raw[4:8] == bytes(4)  # no time stamp: the same data gives the same file
    digest = hashlib.sha256(gzip.decompress(raw)).hexdigest()
    assert digest in (FOLDER / "README.md").read_text(encoding="utf-8"), digest
