"""The lengths that a measurement has are those of the data, and the groups that are made have them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megafuse.bench.lengths import ByteRule, PromptLengths, TokenizerRule, read_lengths, widen
from megafuse.bench.shapes import SHAPES, parameter_count, resolve_shape
from megafuse.bench.synthetic import SyntheticGroups, group_terms
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError
from megafuse.testing.chat_families import CHAT_FAMILIES
from megafuse.testing.tiny import write_tiny_dataset, write_tiny_llama

# published sizes of the checkpoints; qwen2.5-7b: 7,615,616,512 less 28 layers of 3584 + 2 * 512 biases
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512 - 28 * (3584 + 2 * 512),
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
}


def write_scored(path: Path, records: list[tuple[str, list[tuple[str, float | None, str]]]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i, (prompt, responses) in enumerate(records):
            items = [{"source": s, "reward": r, "text": t} for s, r, t in responses]
            file.write(json.dumps({"prompt_id": f"p{i}", "prompt": prompt, "responses": items}) + "\n")
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_published_number_of_parameters(name: str) -> None:
    arch = resolve_shape(Path(name))
    assert name.startswith("tiny") or parameter_count(arch) == PARAMETERS[name]


def test_a_folder_and_an_unknown_shape(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "hf", seed=1)
    assert resolve_shape(folder).num_layers == 4
    with pytest.raises(ConfigError, match=r"'llama-3.1-8' is neither .* did you mean llama-3.1-8b\? Shapes: tiny, "):
        resolve_shape(Path("llama-3.1-8"))


def test_a_template_that_needs_settings_of_build(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whatever its settings, as data"):
        TokenizerRule(CHAT_FAMILIES["qwen_3_thinks"].write(tmp_path))


def test_best_and_worst_of_each_source_by_bytes(tmp_path: Path) -> None:
    path = write_scored(
        tmp_path / "scored.jsonl.gz",
        [
            (
                "12345678",
                [
                    ("a", 0.1, "x" * 4),
                    ("b", 0.2, "\u00e9" * 4),  # 8 bytes
                    ("a", 0.0, "x" * 5),
                    ("b", 0.9, "x" * 20),
                    ("b", 0.4, "x" * 13),
                    ("c", 0.5, "one alone"),
                    ("d", 0.7, "  "),
                    ("d", 0.8, "x"),
                    ("e", 0.7, "x" * 400),
                    ("e", 0.8, "x"),
                ],
            ),
            ("nobody twice", [("a", 0.1, "x"), ("b", 0.2, "x")]),
        ],
    )
    data = read_lengths(path, ByteRule(4), responses=2, max_length=100)
    assert data.prompts == [PromptLengths(2, ((6, 3), (2, 3)))]  # b before a: its best is better
    assert data.left_out == {
        "responses above max_length": 1,
        "sources with fewer than 2 responses": 5,
        "prompts without a source": 1,
        "responses without text or reward": 1,
    }
    three = read_lengths(path, ByteRule(4), responses=3, max_length=100)
    assert three.prompts == [PromptLengths(2, ((6, 5, 3),))]
    one = read_lengths(path, ByteRule(2), responses=1, max_length=100)
    assert one.prompts[0] == PromptLengths(4, ((11,), (2,), (2,), (6,), (3,)))


def test_a_data_set_has_its_own_lengths(tmp_path: Path) -> None:
    built = GroupDataset(write_tiny_dataset(tmp_path / "data", "rank", seed=7, groups=9))
    data = read_lengths(built.path, ByteRule(4), responses=1, max_length=1)
    for group, found in zip(built, data.prompts, strict=True):
        order = np.argsort(-group.rewards, kind="stable")
        assert found.prompt == len(group.prompt)
        assert [s for (s,) in found.sources] == group.response_lengths[order].tolist()


def test_equal_rewards_prefer_no_source(tmp_path: Path) -> None:
    """Sources a and b have one reward and lengths of their own: each comes first in half of the prompts."""
    answers: list[tuple[str, float | None, str]] = [("a", 1.0, "x" * 4), ("b", 1.0, "x" * 40), ("a", 1.0, "x" * 8)]
    found = [
        read_lengths(
            write_scored(tmp_path / "s.jsonl.gz", [("p", order)] * 400), ByteRule(4), responses=1, max_length=99
        )
        for order in (answers, answers[::-1])
    ]
    assert found[0] == found[1]
    for short in ((2,), (3,)):
        first = sum(short in prompt.sources for prompt in found[0].prompts)
        assert abs(first - 200) < 5 * 10, "of the two of source a, either"
    assert abs(sum(prompt.sources[0] == (11,) for prompt in found[0].prompts) - 200) < 5 * 10


def test_missing_data_and_too_many_responses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path = .*nowhere does not exist: give a data set folder"):
        read_lengths(tmp_path / "nowhere", ByteRule(4), responses=2, max_length=10)
    path = write_scored(tmp_path / "one.jsonl.gz", [("p", [("a", 0.1, "x")])])
    with pytest.raises(ConfigError, match=r"no prompt has 2 usable response\(s\) of one source .*prompts without a"):
        read_lengths(path, ByteRule(4), responses=2, max_length=10)


def test_borrowed_sources_are_real_and_of_other_prompts() -> None:
    prompts = [PromptLengths(1, ((10, 11), (12, 13))), PromptLengths(2, ((20, 21),)), PromptLengths(3, ((30, 31),))]
    wide, borrowed = widen(prompts, 5, seed=3)
    assert (wide, borrowed) == widen(prompts, 5, seed=3)
    assert borrowed == 3 + 4 + 4
    for before, after in zip(prompts, wide, strict=True):
        own = len(before.sources)
        assert after.prompt == before.prompt and after.sources[:own] == before.sources and len(after.sources) == 5
        others = [s for p in prompts if p is not before for s in p.sources]
        assert all(s in others for s in after.sources[own:])
    assert widen(prompts, 1, seed=3) == ([PromptLengths(p.prompt, p.sources[:1]) for p in prompts], 0)
    assert widen(prompts[1:2], 2, seed=3)[0] == [PromptLengths(2, ((20, 21), (20, 21)))]


@pytest.mark.parametrize("kind", ["sft", "pair", "rloo"])
def test_groups_have_the_lengths(kind: str) -> None:
    rng = np.random.default_rng()
    prompts = [
        PromptLengths(int(rng.integers(1, 9)), tuple(tuple(rng.integers(1, 9, 2).tolist()) for _ in range(4)))
        for _ in range(6)
    ]
    for sources in (1, 3, 4):
        groups = SyntheticGroups(prompts, sources, kind=kind, vocab_size=50, seed=5)
        flat, offsets = groups.response_lengths
        assert len(groups) == 6
        for i, prompt in enumerate(prompts):
            wanted = [tokens for source in prompt.sources[:sources] for tokens in source]
            group = groups[i]
            assert len(group.prompt) == groups.prompt_lengths[i] == prompt.prompt
            assert group.response_lengths.tolist() == flat[offsets[i] : offsets[i + 1]].tolist() == wanted
            assert groups.group_lengths[i] == prompt.prompt + sum(wanted)
            assert all(ids.min() >= 0 and ids.max() < 50 for ids in (group.prompt, *group.responses))
            assert group.weights.sum() == pytest.approx(1) and len(group.weights) == len(group.members)
            again = SyntheticGroups(prompts, sources, kind=kind, vocab_size=50, seed=5)[i]
            assert np.array_equal(again.responses[-1], group.responses[-1])


def test_terms() -> None:
    assert group_terms("pair", 2, 2)[1].tolist() == [[0, 1], [2, 3]]
    assert group_terms("rloo", 2, 3)[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert group_terms("sft", 2, 1)[1].tolist() == [[0], [1]]
    kept, members = group_terms("wrpo", 2, 2)
    assert (kept, members.tolist()) == ([0, 2, 3], [[0, 1, 2]])  # best of a source; best and worst of the target
