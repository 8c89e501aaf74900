"""FuseChat-3.0's table, row by row, on prompts made by hand; the other recipes; counts by domain and source."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megafuse.cli.build import composition_table
from megafuse.cli.build import run as run_build
from megafuse.config.build import BuildConfig
from megafuse.config.load import load, read_files, validate
from megafuse.data.build import build
from megafuse.data.dataset import GroupDataset
from megafuse.data.split import side_of
from megafuse.errors import ConfigError
from megafuse.testing.tokenizer import make_tokenizer

PRESETS = Path(__file__).parents[2] / "megafuse" / "config" / "presets"
GEMMA, LLAMA, QWEN, QWEN_MATH, LLAMA405 = (
    "gemma-2-27b", "llama-3.1-70b", "qwen2.5-72b", "qwen2.5-math-72b", "llama-3.1-405b",
)  # fmt: skip
Answers = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tokenizer(tmp_path_factory.mktemp("model"), 512)
    (path / "config.json").write_text('{"vocab_size": 512}')
    return path


def prompt(domain: str, answers: Answers, name: str = "p", dataset: str | None = None) -> dict[str, Any]:
    """Answers are (source, reward) or (source, reward, correct)."""
    keys = ("source", "reward", "correct")
    responses = [{"text": f"answer {n}", **dict(zip(keys, answer))} for n, answer in enumerate(answers)]
    row = {"prompt_id": name, "prompt": f"prompt {name}", "domain": domain, "responses": responses}
    return row | ({"dataset": dataset} if dataset else {})


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Any:
    def run(rows: list[dict[str, Any]], kind: str, preset: str = "fusechat3", **more: Any) -> dict[str, Any]:
        """The manifest, with `terms`: prompt_id -> [[(source, reward) of each member] of each term]."""
        source, output = tmp_path / "in.jsonl", tmp_path / f"{preset}-{kind}"
        source.write_text("".join(json.dumps(r) + "\n" for r in [*rows, ALWAYS]))
        values = read_files(BuildConfig, [PRESETS / f"{preset}.toml"])
        values |= {"inputs": (source,), "output": output, "tokenizer": model, "kind": kind, "overwrite": True}
        config = validate(BuildConfig, {**values, "part": "all", **more})
        dataset = GroupDataset(build(config).path)
        terms = {
            g.prompt_id: [[(g.sources[j], g.rewards[j]) for j in term] for term in g.members]
            for g in dataset
            if g.prompt_id != "always"
        }
        return {**dataset.manifest, "terms": terms}

    return run


# a prompt that every recipe keeps, so that an empty result is no error
ALWAYS = prompt("instruction", [(GEMMA, 0.15), (GEMMA, 0.1), ("target", 0.3), ("target", 0.25)], "always")


def gap(best: float, worst: float) -> tuple[str, Answers, Any, Any]:
    return "instruction", [(GEMMA, best), (GEMMA, worst)], (GEMMA, best), [(GEMMA, best), (GEMMA, worst)]


ROWS: dict[str, tuple[str, Answers, Any, Any]] = {
    # name: domain, answers, what SFT takes, what DPO takes
    "instruction": (
        "instruction",
        [(GEMMA, 0.10), (LLAMA, 0.12), (GEMMA, 0.15), (LLAMA, 0.17), (GEMMA, 0.11)],
        (LLAMA, 0.17),
        [(LLAMA, 0.17), (LLAMA, 0.12)],
    ),
    "pairs stay inside a source": ("instruction", [(GEMMA, 0.10), (LLAMA, 0.15)], (LLAMA, 0.15), None),
    "gap of exactly 0.01": gap(0.15, 0.14),  # 0.00999.. in float64
    "gap of exactly 0.1": gap(0.8, 0.7),  # 0.1000..1 in float64
    "gap of exactly 0.1, lower": gap(0.15, 0.05),
    "gap below 0.01": ("instruction", [(GEMMA, 0.15), (GEMMA, 0.1401)], (GEMMA, 0.15), None),
    "gap above 0.1": ("instruction", [(GEMMA, 0.15), (GEMMA, 0.0499)], (GEMMA, 0.15), None),
    "the next source has a fitting gap": (
        "instruction",
        [(GEMMA, 0.9), (GEMMA, 0.1), (LLAMA, 0.15), (LLAMA, 0.1)],
        (GEMMA, 0.9),
        [(LLAMA, 0.15), (LLAMA, 0.1)],
    ),
    "the sixth response does not count": (
        "instruction",
        [*[(GEMMA, 0.1)] * 4, (GEMMA, 0.12), (GEMMA, 0.16)],
        (GEMMA, 0.12),
        [(GEMMA, 0.12), (GEMMA, 0.1)],
    ),
    "math": (
        "math",
        [(QWEN_MATH, 0.2, False), (QWEN_MATH, 0.15, True), (QWEN_MATH, 0.12, False), (QWEN_MATH, 0.14, True),
         (QWEN_MATH, 0.11, False), (LLAMA405, 0.1, True)],
        (QWEN_MATH, 0.15),
        [(QWEN_MATH, 0.15), (QWEN_MATH, 0.11)],
    ),
    "math, only its own sources": ("math", [(GEMMA, 0.9, True), (LLAMA405, 0.1, True)], (LLAMA405, 0.1), None),
    "math, the same gap rule": (
        "math", [(QWEN_MATH, 0.35, True), (QWEN_MATH, 0.1, False)], (QWEN_MATH, 0.35), None,
    ),
    "math, right and wrong of two sources are no pair": (
        "math", [(QWEN_MATH, 0.15, True), (LLAMA405, 0.1, False)], (QWEN_MATH, 0.15), None,
    ),
    "math, the wrong one is preferred": (
        "math", [(QWEN_MATH, 0.1, True), (QWEN_MATH, 0.15, False)], (QWEN_MATH, 0.1), None,
    ),
    "math, all wrong": ("math", [(QWEN_MATH, 0.15, False), (QWEN_MATH, 0.1, False)], None, None),
    "math, not graded": ("math", [(QWEN_MATH, 0.15), (QWEN_MATH, 0.1)], None, None),
    "coding": (
        "coding",
        [(GEMMA, 0.9, False), (GEMMA, 0.8, True), (GEMMA, 0.2, False), (LLAMA, 0.7, True), (LLAMA, 0.1, False)],
        (GEMMA, 0.8),
        [(GEMMA, 0.8), (GEMMA, 0.2)],
    ),
    "coding, all pass": ("coding", [(GEMMA, 0.9, True), (GEMMA, 0.8, True)], (GEMMA, 0.9), None),
    "coding, all fail": ("coding", [(GEMMA, 0.9, False), (LLAMA, 0.8, False)], None, None),
    "coding, the eighth counts, the ninth does not": (
        "coding",
        [*[(GEMMA, 0.1, False)] * 7, (GEMMA, 0.5, True), (GEMMA, 0.9, True)],
        (GEMMA, 0.5),
        [(GEMMA, 0.5), (GEMMA, 0.1)],
    ),
    "chinese": ("chinese", [(GEMMA, 0.9), (QWEN, 0.1), (QWEN, 0.2)], (QWEN, 0.1), None),
    "chinese without its source": ("chinese", [(GEMMA, 0.9)], None, None),
    "another domain": ("poetry", [(GEMMA, 0.15), (GEMMA, 0.1)], None, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "pair"])
def test_every_row_of_the_table(make: Any, kind: str) -> None:
    rows = [prompt(domain, answers, name) for name, (domain, answers, _, _) in ROWS.items()]
    built = make(rows, kind)
    want = {name: [[sft]] if kind == "sft" else [pair] for name, (_, _, sft, pair) in ROWS.items()}
    assert built["terms"] == {name: terms for name, terms in want.items() if terms not in ([[None]], [None])}
    counts = built["counts"]
    assert counts["prompts_dropped.all_failed"] == 2 and counts["prompts_dropped.ungraded"] == 1
    assert counts["prompts_left_out.no_rule_for_the_domain"] == 1
    assert counts.get("prompts_left_out.no_pair_of_the_domain", 0) == (2 if kind == "pair" else 0)
    if kind == "pair":
        drops = {k.partition(".")[2]: n for k, n in counts.items() if k.startswith("terms_dropped.")}
        assert drops["gap_too_small"] == 1 and drops["negative_gap"] == 1 and drops["no_incorrect_response"] == 1


def test_counts_add_up(make: Any) -> None:
    rows = [prompt(d, a, n, dataset=f"set {len(n) % 2}") for n, (d, a, _, _) in ROWS.items()]
    for kind in ("sft", "pair"):
        built = make(rows, kind, part="auto")
        total = Counter[str]()
        for counts in built["counts_by_domain"].values():
            total.update(counts)
            lost = sum(v for k, v in counts.items() if k.startswith(("prompts_left_out.", "prompts_dropped.")))
            assert counts["prompts"] == counts.get("prompts_kept", 0) + lost
        same = {k: v for k, v in built["counts"].items() if not k.startswith(("bad_", "input_records"))}
        assert dict(total) == same
        for row in built["composition"]:
            lost = sum(row["left_out"].values()) + sum(row["dropped"].values())
            assert row["prompts"] == row["kept"] + lost
        given = sum(len(answers) for _, answers, _, _ in ROWS.values()) + len(ALWAYS["responses"])
        assert sum(c["input_responses"] for c in built["counts_by_source"].values()) == given
        assert built["responses"] == sum(c.get("responses_kept", 0) for c in built["counts_by_source"].values())


def test_split_by_domain(make: Any) -> None:
    """Chinese goes to SFT whole; the others by the 4:6 hash."""
    rows = [prompt(d, [(QWEN, 0.15), (QWEN, 0.1)], f"{d}{n}") for d in ("chinese", "instruction") for n in range(60)]
    sft, pair = make(rows, "sft", part="auto"), make(rows, "pair", part="auto")
    ids = [f"instruction{n}" for n in range(60)]
    assert {i for i in sft["terms"] if i[0] == "i"} == {i for i in ids if side_of(i) == "sft"}
    assert set(pair["terms"]) == {i for i in ids if side_of(i) == "po"}
    assert sum(i[0] == "c" for i in sft["terms"]) == 60
    table = composition_table([sft, pair])
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Total Count" in text and "SFT Count" in text and "DPO Count" in text and "Chinese language" in text
    chinese = next(line for line in text.splitlines() if "Chinese" in line)
    assert [cell.strip() for cell in chinese.split("\u2502")[2:5]] == ["60", "60", "0"]


def test_the_command_prints_the_table(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    rows = [prompt(d, a, n, dataset="UltraFeedback") for n, (d, a, _, _) in ROWS.items()]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = read_files(BuildConfig, [PRESETS / "fusechat3.toml"])
    values |= {"inputs": (source,), "tokenizer": model, "part": "all"}
    for kind, more in (("sft", {}), ("pair", {"beside": tmp_path / "sft"})):
        assert run_build(validate(BuildConfig, {**values, "kind": kind, "output": tmp_path / kind, **more})) == 0
    out = capsys.readouterr().out
    assert "UltraFeedback" in out and "all_failed" in out and "gap_too_small" in out and "source gemma-2-27b" in out


def test_the_other_recipes(make: Any) -> None:
    four = prompt("x", [("a", 0.1), ("a", 0.2), ("b", 0.6), ("b", 0.5), ("c", 0.3), ("target", 0.4), ("target", 0.0)])
    assert make([four], "sft", "sft_po_baseline")["terms"] == {"p": [[("b", 0.6)]]}
    assert make([four], "pair", "sft_po_baseline")["terms"] == {"p": [[("b", 0.6), ("b", 0.5)]]}
    assert make([four], "pair", "onpolicy")["terms"] == {"p": [[("target", 0.4), ("target", 0.0)]]}
    assert make([four], "wrpo", "wrpo")["terms"] == {"p": [[("b", 0.6), ("target", 0.4), ("target", 0.0)]]}
    best = [[(s, r)] for s, r in (("b", 0.6), ("b", 0.5), ("target", 0.4), ("c", 0.3))]
    assert make([four], "sft", "fuserl")["terms"] == {"p": best}
    heads = [t[0][0] for t in make([four], "pair", "fuserl")["terms"]["p"]]
    assert heads == ["b", "target", "a"]


def test_settings_that_a_rule_would_replace_are_refused(tmp_path: Path, model: Path) -> None:
    more = tmp_path / "more.toml"
    base = f'inputs = ["a"]\noutput = "b"\ntokenizer = "{model}"\n'
    for lines, word in (
        ('kind = "pair"\nmin_gap = 0.1', "min_gap must be set in the tables"),
        ('kind = "rloo"', "kinds sft, pair and rank"),
        ('kind = "pair"\n[domain_rules.math]\nmin_gap = 0.2\nmax_gap = 0.1', "above max_gap"),
        ('kind = "pair"\n[domain_rules.math]\nmin_gup = 0.2', "min_gup"),
    ):
        more.write_text(base + lines + "\n")
        with pytest.raises(ConfigError, match=word):
            load(BuildConfig, PRESETS / "fusechat3.toml", more)
