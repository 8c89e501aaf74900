"""The quick start's data set: its rules on hand-written texts, its prompts, and that its rewards are what rules say."""

import gzip
import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.testing.examples import QUICKSTART, quickstart_module

rules, prompts, make_data = (quickstart_module(name) for name in ("rules", "prompts", "make_data"))


@pytest.fixture(scope="module")
def data() -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(QUICKSTART / "data.jsonl.gz", "rt", encoding="utf-8")]


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
    raw = (QUICKSTART / "data.jsonl.gz").read_bytes()
    assert len(raw) < 1_500_000
    assert raw[4:8] == bytes(4)  # no time stamp: the same data gives the same file
    digest = hashlib.sha256(gzip.decompress(raw)).hexdigest()
    assert digest in (QUICKSTART / "README.md").read_text(encoding="utf-8"), digest


def test_the_shipped_file_is_what_the_script_makes_of_its_answers(data: list[dict[str, Any]], tmp_path: Path) -> None:
    work, out = tmp_path / "work.jsonl", tmp_path / "data.jsonl.gz"
    with work.open("w", encoding="utf-8") as file:
        for line in data:
            answers = defaultdict(list)
            for response in line["responses"]:
                answers[response["source"]].append((response["text"], response["finish_reason"]))
            for source, found in answers.items():
                file.write(json.dumps({"prompt_id": line["prompt_id"], "source": source, "answers": found}) + "\n")
        file.write('{"prompt_id": "quick-00')  # what a kill in the middle of a write leaves
    assert len(make_data.read_lines(work)) == 4 * len(data)
    assert work.read_bytes().endswith(b"]}\n")
    make_data.assemble(prompts.make_prompts(), work, out)
    assert gzip.decompress(out.read_bytes()) == gzip.decompress((QUICKSTART / "data.jsonl.gz").read_bytes())


class Digits:
    """A tokenizer whose text is token ids with spaces between them; pads on the left."""

    eos_token_id = 2

    def apply_chat_template(self, chat: str, **_: Any) -> str:
        return chat

    def __call__(self, texts: list[str], **_: Any) -> Any:
        from transformers import BatchEncoding

        rows = [[int(token) for token in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def test_batched_sampling_is_one_row_at_a_time_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, repeated caches and rows that leave the batch change nothing: each row alone, without a cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(make_data, "MAX_NEW_TOKENS", 24)
    torch.manual_seed(7)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=12, num_key_value_heads=2, eos_token_id=2, initializer_range=0.15, **size)
    model = LlamaForCausalLM(config).double().eval()
    source = make_data.Source("tiny", "tiny", "tiny", 0, None, 0.9, 11)
    chats = ["5 6 7 8 9 10 11", "3 11", "3 4 5 6"]
    found = make_data.sample(model, Digits(), chats, ["a", "b", "c"], source)
    stopped = 0
    for chat, seed, answers in zip(chats, "abc", found):
        for index, (text, finish) in enumerate(answers):
            generator = torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(60))
            ids, start = [int(token) for token in chat.split()], len(chat.split())
            while len(ids) - start < make_data.MAX_NEW_TOKENS and ids[-1] != 2:
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1].float() / source.temperature
                values, indices = logits.topk(source.top_k)
                uniform = torch.rand(source.top_k, generator=generator).clamp(1e-9, 1 - 1e-7)
                ids.append(int(indices[(values - (-uniform.log()).log()).argmax()]))
            assert text == " ".join(map(str, ids[start:]))
            assert finish == ("stop" if ids[-1] == 2 else "length")
            stopped += finish == "stop"
    assert 6 < stopped < 12  # so that rows have left the batch, and rows have reached the limit
