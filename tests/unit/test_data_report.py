"""`data report`: the numbers against their definition, the page against what a page must not do."""

import json
import math
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megafuse.cli.main import main
from megafuse.data.report import ALPHAS, collect, effective_sources
from megafuse.testing.ranking import best_and_worst, falling

SOURCES = ("a", "b<script>alert(1)</script>", "c$x_1$")


def rows(n: int) -> list[dict[str, Any]]:
    rng = random.Random()
    return [
        {
            "prompt_id": f"p{i}",
            "prompt": f"<img src=x onerror=alert(1)> question {i}",
            "domain": rng.choice(["math", "coding"]),
            "responses": [
                {
                    "source": rng.choice(SOURCES),
                    "text": "word " * rng.randint(1, 40) + "</pre>",
                    "reward": round(rng.random(), 1),
                    "correct": rng.choice([True, False, None]),
                    "finish_reason": rng.choice(["stop", "length"]),
                }
                for _ in range(rng.randint(1, 7))
            ],
        }
        for i in range(n)
    ]


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in given))
    return path


def test_numbers(tmp_path: Path) -> None:
    given = rows(60)
    seed = random.randrange(100)
    data = collect([write(tmp_path / "a.jsonl", given)], seed=seed)
    assert data.prompts == 60 and len(data.groups) == 10
    assert sum(map(len, data.rewards.values())) == sum(len(r["responses"]) for r in given)
    for one in SOURCES:
        for two in set(SOURCES) - {one}:
            scores = []
            for row in given:
                best = [[r["reward"] for r in row["responses"] if r["source"] == s] for s in (one, two)]
                if all(best):
                    x, y = max(best[0]), max(best[1])
                    scores.append(1.0 if x > y else 0.5 if x == y else 0.0)
            assert data.win_rate(one, two) == pytest.approx(sum(scores) / len(scores))
    for source in SOURCES:
        share = 0.0
        for row in given:
            top = {r["source"] for r in row["responses"] if r["reward"] == max(x["reward"] for x in row["responses"])}
            share += (source in top) / len(top)
        assert data.best[source] == pytest.approx(share)
    taken: Counter[str] = Counter()
    tied = 0
    for row in given:
        order = [row["responses"][i] for i in falling(row["responses"], row["prompt_id"], seed)]
        taken.update(r["source"] for r in order[:4])
        tied += len(order) > 4 and order[3]["reward"] == order[4]["reward"]
    assert data.taken == taken and data.tied_at_k == tied
    longer = shorter = 0
    for row in given:
        for source in SOURCES:
            own = [r for r in row["responses"] if r["source"] == source]
            if own and max(r["reward"] for r in own) > min(r["reward"] for r in own):
                chosen, rejected = (own[i] for i in best_and_worst(own, row["prompt_id"], seed))
                if chosen["text"] != rejected["text"]:
                    longer += len(chosen["text"]) > len(rejected["text"])
                    shorter += len(chosen["text"]) < len(rejected["text"])
    assert (data.longer_chosen, data.longer_rejected) == (longer, shorter)
    assert all(x <= y + 1e-9 for x, y in zip(data.effective, data.effective[1:])), "a larger alpha mixes more"


def test_effective_sources() -> None:
    assert effective_sources([1.0, 1.0, 1.0], 1e-4) == pytest.approx(3)
    assert effective_sources([1.0, 0.0], ALPHAS[0]) == 1.0
    p = 1 / (1 + math.exp(-2.0))
    assert effective_sources([1.0, 0.0], 0.5) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "a.jsonl", [*rows(30), {"prompt_id": "z", "prompt": "q", "responses": [{"source": "a", "text": ""}]}]
    )
    flags = ["data", "report", str(source), "--title", "T & <b>", "--output"]
    assert main([*flags, str(tmp_path / "one.html")]) == 0 and main([*flags, str(tmp_path / "two.html")]) == 0
    text = (tmp_path / "one.html").read_text()
    assert text == (tmp_path / "two.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and page.tags.count("svg") == 4 and page.tags.count("details") == 10
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links), "nothing is fetched"
    assert not re.search(r"@import|url\((?!#)", text)
    assert "T &amp; &lt;b&gt;" in text and "empty_text" in text and "prompts without a usable response" in text


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"prompt_id": "z", "prompt": "q", "responses": [{"source": "a", "text": ""}]}]
    )
    assert main(["data", "report", str(source), "--output", str(tmp_path / "x.html")]) == 2
    assert not (tmp_path / "x.html").exists() and "no prompt has a response" in capsys.readouterr().err


def test_an_input_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", rows(3))
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "hard.jsonl").hardlink_to(source)
    for output, word in (
        (source, "is an input"),
        (tmp_path / "x" / ".." / "a.jsonl", "is an input"),
        (tmp_path / "link.jsonl", "is an input"),
        (tmp_path / "hard.jsonl", "is an input"),
        (tmp_path, "is a folder"),
    ):
        assert main(["data", "report", str(source), "--output", str(output)]) == 2
        assert word in capsys.readouterr().err and source.read_bytes() == before


def test_advice_is_for_this_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "a.jsonl", [{"prompt_id": 3}])
    assert main(["data", "report", str(bad), "--output", str(tmp_path / "x.html")]) == 2
    err = capsys.readouterr().err
    assert "1 bad record(s):" in err and "on_bad_record" not in err
