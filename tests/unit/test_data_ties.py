"""Equal rewards in whole data sets: no source is preferred, cuts through ties are told, old data sets are kept.

What one prompt's terms are is tested in test_data_pairs.py.
"""

import gzip
import json
import math
import random
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megafuse.cli import build as build_command
from megafuse.cli.main import main
from megafuse.config.build import BuildConfig
from megafuse.data.build import OLD_TIES, TIES, build
from megafuse.data.dataset import GroupDataset
from megafuse.data.pairs import sft_terms
from megafuse.data.reader import RecordReader
from megafuse.data.records import Rules
from megafuse.data.select import Ties
from megafuse.data.store import MANIFEST
from megafuse.errors import DataError
from megafuse.testing.tokenizer import make_tokenizer

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k_fusion.jsonl.gz"
SEEDS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tokenizer(tmp_path_factory.mktemp("model"), 128)  # one token a character: the same in every version
    (path / "config.json").write_text('{"vocab_size": 128}')
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(source: Path, output: Path, model: Path, **settings: Any) -> BuildConfig:
    return BuildConfig(**{"inputs": (source,), "output": output, "tokenizer": model, "part": "all", **settings})


def rows_of(rng: random.Random, n: int, *, ties: bool, sources: str = "abcd") -> list[dict[str, Any]]:
    """Prompts with four to ten responses; with ties the rewards are 0 or 1."""

    def word() -> str:
        return "".join("abcdefgh"[int(rng.random() * 8)] for _ in range(12))

    def response() -> dict[str, Any]:
        reward = rng.random()
        correct = rng.random() < 0.5
        return {
            "source": sources[int(rng.random() * len(sources))],
            "text": word(),
            "reward": float(reward < 0.8) if ties else reward,
            "correct": correct,
        }

    return [
        {
            "prompt_id": f"p{i}",
            "prompt": word(),
            "domain": "math",
            "responses": [response() for _ in range(4 + int(rng.random() * 7))],
        }
        for i in range(n)
    ]


def expected(rewards: dict[str, list[float]], k: int) -> dict[str, Fraction]:
    """How many of the k highest each source has on average, where sources with equal rewards take turns at random."""
    taken: dict[str, Fraction] = defaultdict(Fraction)
    left = k
    for level in sorted({r for own in rewards.values() for r in own}, reverse=True):
        waiting = {source: own.count(level) for source, own in rewards.items() if level in own}
        while waiting and left:
            share = min(Fraction(1), Fraction(left, len(waiting)))  # all of a whole turn, a fair draw in a part of one
            for source in waiting:
                taken[source] += share
            left -= min(left, len(waiting))
            waiting = {source: n - 1 for source, n in waiting.items() if n > 1}
    return taken


def drawn(rng: random.Random, rewards: dict[str, list[float]], k: int) -> Counter[str]:
    """One such draw, with the sources in a random order."""
    order = rng.sample(sorted(rewards), len(rewards))
    queue = []
    for level in sorted({r for own in rewards.values() for r in own}, reverse=True):
        queue += [(-level, turn, place, s) for place, s in enumerate(order) for turn in range(rewards[s].count(level))]
    return Counter(source for *_, source in sorted(queue)[:k])


def test_the_expectation_is_that_of_draws() -> None:
    rng = random.Random()
    for _ in range(5):
        rewards = {s: [float(rng.random() < 0.7) for _ in range(rng.randint(1, 4))] for s in "abcde"}
        counts: Counter[str] = Counter()
        for _ in range(2000):
            counts.update(drawn(rng, rewards, 4))
        for source, mean in expected(rewards, 4).items():
            p = float(mean % 1)
            assert abs(counts[source] - 2000 * float(mean)) <= 5 * math.sqrt(2000 * p * (1 - p)) + 1e-9


@pytest.mark.skipif(not GSM8K.is_file(), reason="the shared data is not beside the repository")
def test_fusesft_on_verifier_rewards_prefers_no_source(tmp_path: Path) -> None:
    """gsm8k_fusion: 0/1 rewards of five families. Of 3,944 responses the family first in the file had 2,333 once."""
    records = list(RecordReader([GSM8K], Rules()))
    mean: dict[str, float] = defaultdict(float)
    variance: dict[str, float] = defaultdict(float)
    for record in records:
        rewards: dict[str, list[float]] = defaultdict(list)
        for response in record.responses:
            rewards[response.source].append(response.reward or 0.0)
        for source, share in expected(rewards, 4).items():
            mean[source] += float(share)
            variance[source] += float(share % 1 * (1 - share % 1))  # a turn is whole, or one draw of 0 or 1

    def selection(files: list[Path], seed: int) -> dict[str, list[tuple[str, str, str | None]]]:
        return {
            r.prompt_id: [
                (r.responses[i].source, r.responses[i].text, r.responses[i].model)
                for (i,) in sft_terms(r.responses, Ties(r.prompt_id, seed), k=4).members
            ]
            for r in RecordReader(files, Rules())
        }

    total: Counter[str] = Counter()
    for seed in range(SEEDS):
        counts = Counter(source for taken in selection([GSM8K], seed).values() for source, *_ in taken)
        assert counts.total() == 3944
        for source, average in mean.items():
            assert abs(counts[source] - average) < 5 * math.sqrt(variance[source]), (seed, source, counts, average)
        total.update(counts)
    for source, average in mean.items():
        assert abs(total[source] - SEEDS * average) < 5 * math.sqrt(SEEDS * variance[source]), (source, total)

    rng = random.Random()
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        rng.shuffle(row["responses"])
    rng.shuffle(rows)
    assert selection([write(tmp_path / "shuffled.jsonl", rows)], 3) == selection([GSM8K], 3)
    tied = sum(bool(sft_terms(r.responses, Ties(r.prompt_id, 0), k=4).tied_at_k) for r in records)
    assert tied == 974, "counted when the fault was found"


@pytest.mark.parametrize("kind", ["sft", "pair", "rloo", "wrpo"])
def test_shuffled_responses_give_the_same_terms(tmp_path: Path, model: Path, kind: str) -> None:
    rng = random.Random()
    rows = rows_of(rng, 150, ties=True)
    settings: dict[str, Any] = {"kind": kind, "k": 3 if kind != "wrpo" else None, "alpha": 1.0}
    settings |= {"target_source": "a"} if kind == "wrpo" else {}
    found = []
    for name in ("one", "two"):
        path = write(tmp_path / f"{name}.jsonl", rows)
        data = GroupDataset(build(config(path, tmp_path / name, model, **settings)).path)
        terms = {}
        for group in data:
            held = [(s, r.tobytes()) for s, r in zip(group.sources, group.responses)]
            members = [[held[j] for j in term if j >= 0] for term in group.members]
            terms[group.prompt_id] = ([sorted(m) if kind == "rloo" else m for m in members], group.weights.tobytes())
        found.append((terms, data.manifest["counts"], data.manifest["weight_by_source"]))
        for row in rows:
            rng.shuffle(row["responses"])
        rng.shuffle(rows)
    assert found[0] == found[1]


# first digits of digest.data at commit a8bb303, before ties were broken by hash; uniform, as exp may differ by machine
UNIFORM: dict[str, Any] = {"weighting": "uniform"}
UNTIED: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({**UNIFORM, "kind": "sft", "k": 3}, "bbfba5e5c9f24f30"),
    "top1_per_source": (
        {**UNIFORM, "kind": "sft", "selection": "top1_per_source", "k": 2},
        "6bcacff817e385b1",
    ),
    "single_best": (
        {**UNIFORM, "kind": "sft", "selection": "single_best"},
        "fa29468bdd3e3ec6",
    ),
    "correct": (
        {**UNIFORM, "kind": "sft", "use_correct": True},
        "7b8073cf54b8801d",
    ),
    "pair": ({**UNIFORM, "kind": "pair"}, "59a6112eb35aa41b"),
    "pair of two": (
        {**UNIFORM, "kind": "pair", "k": 2, "use_correct": True},
        "e651172e37824204",
    ),
    "rloo": ({**UNIFORM, "kind": "rloo", "k": 2}, "f3ee50086a9afca2"),
    "wrpo": (
        {"kind": "wrpo", "target_source": "a"},
        "7eaa9a8352512c15",
    ),
    "rank": ({"kind": "rank"}, "39645372050326b4"),
}


@pytest.mark.parametrize("name", UNTIED)
def test_data_without_ties_is_what_it_was(tmp_path: Path, model: Path, name: str) -> None:
    settings, digest = UNTIED[name]
    path = write(tmp_path / "in.jsonl", rows_of(random.Random(20), 80, ties=False))
    manifest = build(config(path, tmp_path / "out", model, **settings)).manifest
    assert manifest["digest"]["data"].startswith(digest)
    assert manifest["counts"].get("prompts_with_a_cut_through_a_tie", 0) == 0
    assert (manifest.get("ties") == TIES) == (name != "rank")


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    """The manifest of a data set with some keys changed, or (None) removed; returns it."""
    manifest = {**json.loads((path / MANIFEST).read_text()), **changes}
    manifest = {key: value for key, value in manifest.items() if value is not None}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def test_an_old_data_set_stays_what_it_is(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in.jsonl", rows_of(random.Random(), 40, ties=True))
    settings = config(path, tmp_path / "out", model, kind="sft")
    new = build(settings).manifest
    assert not build(settings).warnings
    old = edit(tmp_path / "out", ties=None, weight_by_source=None, marker="old")
    kept = build(settings)
    assert not kept.fresh and kept.manifest == old and OLD_TIES in kept.warnings
    assert build_command.run(settings) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "stands first in the file" in out and "--overwrite" in out and "already there" in out
    with pytest.raises(DataError, match="built differently"):
        build(settings.model_copy(update={"k": 3}))
    anew = build(settings.model_copy(update={"overwrite": True}))
    assert anew.fresh and not anew.warnings and anew.manifest["digest"] == new["digest"]
    assert anew.manifest["ties"] == TIES
    edit(tmp_path / "out", ties="in another way, of a later version")
    with pytest.raises(DataError, match="built differently"):
        build(settings)


def test_an_old_rank_data_set_is_no_other(tmp_path: Path, model: Path) -> None:
    """It takes every response: nothing is ordered."""
    path = write(tmp_path / "in.jsonl", rows_of(random.Random(), 10, ties=True))
    settings = config(path, tmp_path / "out", model, kind="rank")
    assert "ties" not in build(settings).manifest
    again = build(settings.model_copy(update={"overwrite": True}))
    assert not again.fresh and not again.warnings


def row(name: str, *answers: tuple[str, str, float]) -> dict[str, Any]:
    return {
        "prompt_id": name,
        "prompt": "question",
        "responses": [{"source": source, "text": text, "reward": reward} for source, text, reward in answers],
    }


def test_what_build_tells(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four prompts one ties at k = 2; one has nothing left out; one is cut between rewards; one has no response."""
    rows = [
        row("tied", ("a", "x", 1.0), ("b", "y", 1.0), ("c", "z", 1.0)),
        row("short", ("a", "x", 1.0), ("b", "y", 1.0)),
        row("clear", ("a", "x", 1.0), ("b", "y", 0.5), ("c", "z", 0.0)),
        row("long", ("a", "x" * 500, 1.0)),
    ]
    source = write(tmp_path / "in.jsonl", rows)
    settings = config(source, tmp_path / "out", model, kind="sft", k=2, max_length=400, alpha=0.5)
    assert build_command.run(settings) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "in 1 of 3 prompts the k-th ties with one left out" in out
    assert "megafuse score --reward armorm" in out and "--use_correct" in out and "FuseChat-3.0" in out
    manifest = GroupDataset(tmp_path / "out").manifest
    counts = manifest["counts"]
    assert (counts["prompts_with_a_cut"], counts["prompts_with_a_cut_through_a_tie"]) == (3, 1)
    by_source = manifest["counts_by_source"]
    assert [by_source[s]["responses_to_select_from"] for s in "abc"] == [3, 3, 2]
    assert sum(by_source[s].get("responses_kept", 0) for s in "abc") == 6
    weights: dict[str, float] = defaultdict(float)
    for group in GroupDataset(tmp_path / "out"):
        for members, weight in zip(group.members, group.weights):
            weights[group.sources[members[0]]] += weight
    assert manifest["weight_by_source"] == pytest.approx(dict(weights)) and sum(weights.values()) == pytest.approx(3)
    clear = write(tmp_path / "clear.jsonl", rows[2:3])
    assert build_command.run(config(clear, tmp_path / "clear", model, kind="sft", k=2)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "in 0 of 1 prompts the k-th ties" in out and "megafuse score" not in out
    assert build_command.run(config(clear, tmp_path / "rank", model, kind="rank")) == 0
    out = capsys.readouterr().out
    assert "k-th" not in out and "Shares of the sources" not in out


@pytest.mark.parametrize(
    ("settings", "cut", "tied"),
    [
        ({"kind": "sft", "selection": "single_best"}, 1, 1),
        ({"kind": "sft", "selection": "top1_per_source", "k": 1}, 1, 1),
        ({"kind": "sft", "selection": "top1_per_source", "k": 2}, 1, 0),
        ({"kind": "sft", "selection": "top1_per_source"}, 0, 0),
        ({"kind": "pair"}, 0, 0),
        ({"kind": "pair", "k": 1}, 1, 1),
        ({"kind": "pair", "selection": "top1"}, 1, 1),
        ({"kind": "rloo", "k": 2}, 1, 0),
        ({"kind": "wrpo", "target_source": "c"}, 1, 1),
        ({"kind": "sft", "domain_rules": {"*": {"sft": "single_best"}}}, 1, 1),
        ({"kind": "pair", "domain_rules": {"*": {"pair": "top1"}}}, 1, 1),
    ],
)
def test_every_cut_is_counted(tmp_path: Path, model: Path, settings: dict[str, Any], cut: int, tied: int) -> None:
    answers = [(source, f"{source}{n}", reward) for source in "abc" for n, reward in enumerate((1.0, 0.0))]
    answers[4] = ("c", "c0", 0.5)
    source = write(tmp_path / "in.jsonl", [row("p", *answers)])
    counts = build(config(source, tmp_path / "out", model, **settings)).manifest["counts"]
    assert counts.get("prompts_with_a_cut", 0) == cut and counts.get("prompts_with_a_cut_through_a_tie", 0) == tied


def test_check_and_report_tell_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    five = [(source, f"text of {source}", 1.0) for source in "abcde"]
    path = write(tmp_path / "in.jsonl", [row("tied", *five), row("whole", *five[:4])])
    assert main(["data", "check", str(path)]) == 0
    told = "in 1 of 2 prompts the 4th highest reward ties with one left out"
    assert told in " ".join(capsys.readouterr().out.split())
    assert main(["data", "report", str(path), "--output", str(tmp_path / "x.html")]) == 0
    page = " ".join((tmp_path / "x.html").read_text().split())
    assert "In 1 of 2 prompts the last of them ties with one left out" in page and "megafuse score" in page
    assert "<td>e</td><td>11.1%</td>" in page, "one of nine answers"
    clear = write(tmp_path / "clear.jsonl", [row("whole", *five[:4])])
    assert main(["data", "check", str(clear)]) == 0
    assert "ties with one left out" not in capsys.readouterr().out
    assert main(["data", "report", str(clear), "--output", str(tmp_path / "y.html")]) == 0
    page = (tmp_path / "y.html").read_text()
    assert "In 0 of 1 prompts" in page and "megafuse score" not in page
