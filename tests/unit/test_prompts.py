"""`prompts`: every recipe on small folders in its set's real schema, filters, duplicates, counts that add up."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megafuse.cli.main import main
from megafuse.config.load import validate
from megafuse.config.prompts import PromptsConfig
from megafuse.data.prompt_recipes import RECIPES, leetcode_tests, leetcode_text
from megafuse.data.prompts import language_of, make_prompts
from megafuse.errors import ConfigError, DataError
from megafuse.rewards.code import grade_code
from megafuse.rewards.sandbox import Sandbox
from megafuse.sampling.registry import REGISTRY

ZH = "\u8bf7\u5199\u4e00\u9996\u5173\u4e8e\u6625\u5929\u7684\u8bd7\uff0c" * 2
# as the set has it: Markdown of a page, with escaped brackets and a space before closing quotes
LEETCODE = (
    "Given an array of integers `nums` and an integer `target`, return _indices_.\n\n**Example 1:**\n\n"
    "**Input:** nums = \\[2,7,11,15\\], target = 9\n**Output:** \\[0,1\\]\n**Explanation:** Because.\n\n"
    "**Example 2:**\n\n**Input:** nums = \\[3,3\\], target = 6\n**Output:** \\[0,1\\]\n"
)
PYTHON = (
    "\n    ```python\ndef helper(left, right):\n    pass\n\ndef twoSum(nums: list, target: int = 0):\n    pass\n```\n"
)
SETS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "ultrafeedback": (
        [
            {"source": "flan", "instruction": "Why is the sky blue at noon?", "models": ["a"], "completions": [],
             "correct_answers": ["None"], "incorrect_answers": ["None"]},
            {"source": "evol", "instruction": "Write a python function that sorts", "models": [], "completions": [],
             "correct_answers": [], "incorrect_answers": []},
        ],
        1,
    ),
    "magpie_pro_dpo": (
        [
            {"uuid": "1", "instruction": "Tell me about the river Elbe.", "chosen": [], "rejected": [],
             "task_category": "Information seeking"},
            {"uuid": "2", "instruction": "What is 3 plus four, please?", "chosen": [], "rejected": [],
             "task_category": "Math"},
            {"uuid": "3", "instruction": "Summarise this table of sales.", "chosen": [], "rejected": [],
             "task_category": "Data Analysis"},
        ],
        1,
    ),
    "helpsteer2": (
        [{"prompt": "Describe a quiet harbour.", "response": r, "helpfulness": 3, "correctness": 3, "coherence": 4,
          "complexity": 1, "verbosity": 1} for r in ("one", "two")],
        1,
    ),
    "openmathinstruct2": (
        [{"problem": "What is 2+3, exactly?", "generated_solution": f"It is \\boxed{{{n}}}", "expected_answer": "5",
          "problem_source": "augmented_math"} for n in (5, 5, 6)]
        + [{"problem": "Without an answer, is it?", "generated_solution": "x", "expected_answer": "",
            "problem_source": "math"}],
        1,
    ),
    "leetcode": (
        [{"id": 1, "slug": "two-sum", "title": "Two Sum", "difficulty": "Easy", "content": LEETCODE, "java": "",
          "c++": "", "python": PYTHON, "javascript": ""},
         {"id": 2, "slug": "x", "title": "X", "difficulty": "Easy", "content": "Draw this tree without examples.",
          "java": "", "c++": "", "python": PYTHON, "javascript": ""}],
        1,
    ),
    "self_oss_instruct": (
        [{"fingerprint": None, "sha1": "a", "seed": "def f(): ...", "concepts": [], "prompt": "p", "id": 1,
          "instruction": "Write a function that doubles a number.",
          "response": "```python\ndef double(x):\n    return 2 * x\n```\n```python\nassert double(2) == 4\n```"},
         {"fingerprint": None, "sha1": "c", "seed": "", "concepts": [], "prompt": "p", "id": 3,
          "instruction": "Write a function that triples.\n\nYour code should pass the following test case:\n"
          "```python\nx = 2\nassert triple(x) == 6\n```",
          "response": "```python\ndef triple(x):\n    return 3 * x\n```"},
         {"fingerprint": None, "sha1": "b", "seed": "", "concepts": [], "prompt": "p", "id": 2,
          "instruction": "Write a function that has no tests.", "response": "```python\nx = 1\n```"}],
        2,
    ),
    "alpaca_gpt4_zh": (
        [{"instruction": ZH, "input": "", "output": "x"},
         {"instruction": ZH, "input": "\u8981\u77ed\u4e00\u70b9\u3002", "output": "x"},
         {"instruction": "In English this time, please.", "input": "", "output": "x"},
         {"instruction": "\u8bf7\u7528\u4ee3\u7801\u5b9e\u73b0\u6392\u5e8f", "input": "", "output": "x"}],
        2,
    ),
    "magpie_qwen2_pro_zh": (
        [{"uuid": "1", "instruction": ZH, "response": "x", "conversations": [], "task_category": "Creative writing"},
         {"uuid": "2", "instruction": ZH + "\u3002", "response": "x", "conversations": [],
          "task_category": "Coding & Debugging"}],
        1,
    ),
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(tmp_path: Path, name: str, data: Path | None, **more: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    output = tmp_path / "prompts.jsonl"
    config = validate(PromptsConfig, {"recipe": name, "output": output, "data": data, **more})
    counts = make_prompts(config).counts
    dropped = sum(v for k, v in counts.items() if k.startswith("dropped."))
    assert counts["rows"] == dropped + counts["prompts"], "every row is a prompt or counted"
    assert json.loads((tmp_path / "prompts.jsonl.manifest.json").read_text())["counts"] == counts
    return lines(output), counts


def test_every_set_of_the_papers_has_a_recipe() -> None:
    assert set(SETS) == set(RECIPES)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", SETS)
def test_recipes(tmp_path: Path, name: str, form: str) -> None:
    rows, kept = SETS[name]
    folder = tmp_path / "data"
    table = datasets.Dataset.from_list(rows)
    if form == "saved":
        table.save_to_disk(str(folder))
    else:
        folder.mkdir()
        path = str(folder / f"train.{form}")
        table.to_json(path) if form == "jsonl" else table.to_parquet(path)
    found, _ = run(tmp_path, name, folder)
    assert len(found) == kept
    recipe = RECIPES[name]
    for record in found:
        assert record["domain"] == recipe.domain and record["dataset"] == recipe.hub.split("/")[1]
        assert record["prompt_id"].startswith(f"{name}-") and record["prompt"].strip()
        assert ("gold" in record) == (recipe.domain == "math") and ("tests" in record) == (recipe.domain == "coding")


def saved(tmp_path: Path, name: str, extra: list[dict[str, Any]] | None = None) -> Path:
    datasets.Dataset.from_list([*SETS[name][0], *(extra or [])]).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def test_tests_of_the_coding_sets_work(tmp_path: Path) -> None:
    box = Sandbox(unsafe=True)
    (record,), counts = run(tmp_path, "leetcode", saved(tmp_path, "leetcode"))
    assert counts["dropped.without_tests"] == 1 and "`twoSum(nums, target)`" in record["prompt"]
    right = "def twoSum(nums, target):\n    return [0, 1]"
    assert grade_code(box, right, record["tests"]) == (True, "passed")
    assert grade_code(box, right.replace("1]", "2]"), record["tests"]) == (False, "failed")
    (record, stated), counts = run(tmp_path, "self_oss_instruct", saved(tmp_path / "b", "self_oss_instruct"))
    assert counts["dropped.without_tests"] == 1
    assert grade_code(box, "def triple(x):\n    return x * 3", stated["tests"]) == (True, "passed")
    assert grade_code(box, "def triple(x):\n    return x", stated["tests"]) == (False, "failed")
    assert grade_code(box, "def double(x):\n    return x + x", record["tests"]) == (True, "passed")
    assert grade_code(box, "def double(x):\n    return x", record["tests"]) == (False, "failed")


@pytest.mark.parametrize(
    ("given", "result", "code", "signature", "call"),
    [
        ('s =  "abcabcbb "', "3", "def longest(s):\n    pass", "longest(s)", "candidate('abcabcbb') == 3"),
        ('words = \\["a ", "b "\\]', '\\["b "\\]', "def f(words):", "f(words)", "candidate(['a', 'b']) == ['b']"),
        ("root = \\[1,null,3\\], low = 1", "true", "def trim(self, root, low):", "trim(root, low)",
         "candidate([1, None, 3], 1) == True"),
        ("n = 19", "true", "def get_next(n):\n\ndef is_happy(n):", "is_happy(n)", "candidate(19) == True"),
        ("n = 19", "true", "def walk(k):\n\ndef solve(n):", "solve(n)", "candidate(19) == True"),
        ("n = 2", "4", "def other(a, b, c):", None, None),  # the solution of another problem
        ("n = 2", "4", "def power(n, memo={}):", "power(n)", "candidate(2) == 4"),
        ("a 3 x 3 board", "4", "def board(n):", None, None),
    ],
)  # fmt: skip
def test_examples_of_leetcode(given: str, result: str, code: str, signature: str | None, call: str | None) -> None:
    row = {
        "slug": "is-happy",
        "content": f"**Input:** {given}\n**Output:** {result}\n",
        "python": f"```python\n{code}\n```",
    }
    tests = leetcode_tests(row)
    assert (tests is None) == (call is None)
    if tests is not None and signature is not None:
        assert f"assert {call}\n" in tests["code"] and tests["entry_point"] == signature.split("(")[0]
        assert f"`{signature}`" in leetcode_text(row)


def test_responses_that_a_set_brings_along(tmp_path: Path) -> None:
    given = tmp_path / "llama.jsonl"
    (record,), counts = run(tmp_path, "openmathinstruct2", saved(tmp_path, "openmathinstruct2"), given=given)
    assert record["gold"] == "5" and counts["dropped.duplicate"] == 2 and counts["dropped.without_gold"] == 1
    (row,) = lines(given)
    assert [r["text"] for r in row["responses"]] == ["It is \\boxed{5}", "It is \\boxed{6}"]
    assert {r["source"] for r in row["responses"]} == {"llama-3.1-405b"} and row["prompt_id"] == record["prompt_id"]


def test_filters(tmp_path: Path) -> None:
    def row(text: str) -> dict[str, Any]:
        return {**SETS["ultrafeedback"][0][0], "instruction": text}

    extra = [
        row(t)
        for t in (
            "WHY is the  sky blue at noon?",
            "short",
            "x " * 4000,
            "\u041f\u043e\u0447\u0435\u043c\u0443 \u043d\u0435\u0431\u043e \u0433\u043e\u043b\u0443\u0431\u043e\u0435?",
            " ",
            "Who wrote Faust, and when?",
        )
    ]
    folder = saved(tmp_path, "ultrafeedback", extra)
    found, counts = run(tmp_path, "ultrafeedback", folder)
    assert [r["prompt"] for r in found] == ["Why is the sky blue at noon?", "Who wrote Faust, and when?"]
    names = ("duplicate", "length", "language", "empty", "code_or_math")
    assert [counts[f"dropped.{name}"] for name in names] == [1, 2, 1, 1, 1]
    one, counts = run(tmp_path, "ultrafeedback", folder, max_prompts=1)
    assert len(one) == 1 and one[0] in found and counts["dropped.beyond_max_prompts"] == 1
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text(
        json.dumps({"prompt_id": "b", "prompt": "Q: why?", "question": "who wrote faust, and when?"}) + "\n"
    )
    rest, counts = run(tmp_path, "ultrafeedback", folder, exclude=(benchmark,))
    assert len(rest) == 1 and counts["dropped.excluded"] == 1


def test_languages() -> None:
    assert (
        language_of("What is this?") == "en"
        and language_of("\u7528 Python \u5199") == "zh"
        and language_of("\u3053\u308c\u306f\u4f55\uff1f") is None
    )
    assert language_of("\u042d\u0442\u043e") is None and language_of("123 !") is None


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean ultrafeedback"):
        run(tmp_path, "ultrafeadback", tmp_path)
    with pytest.raises(ConfigError, match="holds no"):
        run(tmp_path, "helpsteer2", tmp_path)
    with pytest.raises(DataError, match="no column problem"):
        run(tmp_path, "openmathinstruct2", saved(tmp_path, "helpsteer2"))
    with pytest.raises(DataError, match=r"no prompt is left.*length"):
        run(tmp_path, "helpsteer2", tmp_path / "set", max_chars=3, min_chars=0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"prompt": "x"}\n{"pro')
    with pytest.raises(ConfigError, match="cannot be read"):
        run(tmp_path, "helpsteer2", tmp_path / "broken")


def folder_of(folder: Path, *names: str) -> Path:
    """Files with one prompt each, which tells the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {**SETS["helpsteer2"][0][0], "prompt": f"Describe the file {name} to me."}
        path.write_text(json.dumps(row) + "\n")
    return folder


def read(tmp_path: Path, data: Path, **more: Any) -> set[str]:
    found, _ = run(tmp_path, "helpsteer2", data, **more)
    names = {record["prompt"].split()[3] for record in found}
    files = json.loads((tmp_path / "prompts.jsonl.manifest.json").read_text())["files"]
    assert all(any(file.endswith(name) for file in files) for name in names) and len(files) == len(names)
    return names


def test_splits_of_files(tmp_path: Path) -> None:
    two = folder_of(tmp_path / "two", "train.jsonl", "validation.jsonl", "train_1M-00000-of-00002.jsonl")
    assert read(tmp_path, two) == {"train.jsonl"} == read(tmp_path, two, split="train")
    assert read(tmp_path, two, split="validation") == {"validation.jsonl"} == read(tmp_path, two, split="dev")
    assert read(tmp_path, two, split="train_1M") == {"train_1M-00000-of-00002.jsonl"}
    with pytest.raises(ConfigError, match=r"split 'test': they name train, train_1M, validation"):
        read(tmp_path, two, split="test")
    shards = folder_of(tmp_path / "shards", "train/0000.jsonl", "train/0001.jsonl", "test/0000.jsonl", "x_test.jsonl")
    assert read(tmp_path, shards) == {"train/0000.jsonl", "train/0001.jsonl"}
    assert read(tmp_path, shards, split="test") == {"test/0000.jsonl", "x_test.jsonl"}
    plain = folder_of(tmp_path / "plain", "a.jsonl", "b.jsonl")
    assert read(tmp_path, plain) == {"a.jsonl", "b.jsonl"}
    with pytest.raises(ConfigError, match="they name none"):
        read(tmp_path, plain, split="train")
    with pytest.raises(ConfigError, match="split 'train': they name test, validation"):
        read(tmp_path, folder_of(tmp_path / "none", "test.jsonl", "valid.jsonl"))
    with pytest.raises(ConfigError, match="one set, of split None: not 'test'"):
        run(tmp_path, "helpsteer2", saved(tmp_path, "helpsteer2"), split="test")


def test_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = folder_of(tmp_path / "two", "a.jsonl", "validation.jsonl")
    assert read(tmp_path, two / "a.jsonl") == {"a.jsonl"}
    assert read(tmp_path, two / "validation.jsonl") == {"validation.jsonl"}
    with pytest.raises(ConfigError, match="does not exist"):
        read(tmp_path, two / "c.jsonl")
    flags = ["prompts", "--recipe", "helpsteer2", "--data", str(two), "--output", str(tmp_path / "o.jsonl.gz")]
    assert main(flags) == 0 and f"read: {two / 'a.jsonl'}" in capsys.readouterr().out
    packed = (tmp_path / "o.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress(packed))["prompt"] == "Describe the file a.jsonl to me."
    assert packed[3:8] == bytes(5), "no name, no time"


def test_an_output_is_no_input(tmp_path: Path) -> None:
    two = folder_of(tmp_path / "two", "train.jsonl", "validation.jsonl")
    before = (two / "train.jsonl").read_bytes()
    for name, word in (
        ("train.jsonl", "is an input"), ("sub/train-2.jsonl", "would be read"), (".", "is a folder")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=word):
            make_prompts(validate(PromptsConfig, {"recipe": "helpsteer2", "data": two, "output": two / name}))
        with pytest.raises(ConfigError, match=rf"given.*{word}"):
            run(tmp_path, "helpsteer2", two, given=two / name)
    assert (two / "train.jsonl").read_bytes() == before
    make_prompts(validate(PromptsConfig, {"recipe": "helpsteer2", "data": two, "output": two / "mine.jsonl"}))
    with pytest.raises(ConfigError, match=r"given = .* is another output"):
        run(tmp_path, "helpsteer2", two, given=tmp_path / "prompts.jsonl")


def test_what_there_is_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "list"]) == 0 and main(["sample", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*RECIPES, *REGISTRY)) and "repetition" in out
