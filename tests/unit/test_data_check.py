"""`megafuse data check` and `megafuse build` as commands: what they print and their exit status."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megafuse.cli import build as build_command
from megafuse.cli import data_check
from megafuse.data.check import check, percentiles
from megafuse.testing.tokenizer import make_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def lines(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return path


def row(prompt_id: str, *rewards: float, source: str = "a") -> dict[str, Any]:
    responses = [{"source": source, "text": f"text {i}", "reward": r} for i, r in enumerate(rewards)]
    return {"prompt_id": prompt_id, "prompt": "12345", "domain": "math", "responses": responses}


def test_statistics(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [row("1", 0.0, 2.0, 1.0), row("2", 1.0, 1.0), row("3", 5.0, source="b")])
    report = check([path], lengths=lambda texts: [len(t.split()) for t in texts])
    assert report.ok and (report.prompts, report.responses) == (3, 6) and report.domains == {"math": 3}
    assert report.gaps == [2.0] and report.no_pair == {"tie": 1, "one_response": 1} and report.tie_rate == 0.5
    assert report.sources["a"].rewards == [0, 2, 1, 1, 1] and report.sources["a"].tokens == [2] * 5
    assert report.prompt_chars == [5, 5, 5] and report.prompt_tokens == [1, 1, 1]
    assert (
        percentiles([1, 2, 3, 4]) == tuple(np.percentile([1, 2, 3, 4], [0, 50, 95, 100]))
        and percentiles([]) == (0,) * 4
    )


def test_command_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = lines(tmp_path / "good.jsonl", [row(str(i), 1.0, float(i)) for i in range(5)])
    tokenizer = make_tokenizer(tmp_path / "model", 300)
    (tokenizer / "config.json").write_text('{"vocab_size": 300}')
    assert data_check.run(data_check.DataCheckConfig(files=(good,), tokenizer=tokenizer)) == 0
    assert "0 bad record(s)" in capsys.readouterr().out
    bad = lines(tmp_path / "bad.jsonl", [row("0", 1.0)], tail="[1]\n" * 23 + '{"prompt_id": 3}\n')
    assert data_check.run(data_check.DataCheckConfig(files=(good, bad))) == 2
    out = capsys.readouterr().out
    assert f"{bad}:1:1: prompt_id '0' was already seen at {good}:1" in out
    assert f"{bad}:20:1: must be an object" in out and f"{bad}:21:" not in out
    assert "25 bad record(s), 5 of them not shown" in out
    assert data_check.run(data_check.DataCheckConfig(files=(tmp_path / "absent.jsonl",))) == 2
    out = capsys.readouterr().out
    assert "No such file" in out and "bad record(s)" not in out
    empty = lines(tmp_path / "empty.jsonl", [], tail="\n\n")
    assert data_check.run(data_check.DataCheckConfig(files=(empty,))) == 2
    out = capsys.readouterr().out
    assert "no records in" in out and "bad record(s)" not in out
    assert data_check.run(data_check.DataCheckConfig(files=(empty, good))) == 0
    capsys.readouterr()
    assert data_check.run(data_check.DataCheckConfig(files=(tmp_path,))) == 2
    out = capsys.readouterr().out
    assert "Is a directory" in out and "bad record(s)" not in out


def test_nothing_left_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"source": "a", "text": " ", "reward": 1.0}
    path = lines(tmp_path / "x.jsonl", [{"prompt_id": "1", "prompt": "Hi", "responses": [empty]}])
    assert data_check.run(data_check.DataCheckConfig(files=(path,), on_bad_response="drop")) == 2
    assert "0 bad record(s); no good response is left" in capsys.readouterr().out
    assert data_check.run(data_check.DataCheckConfig(files=(path,))) == 2
    assert "1 bad record(s); no good record is left" in capsys.readouterr().out
    assert data_check.run(data_check.DataCheckConfig(files=(path,), form="prompts")) == 0
    some = lines(tmp_path / "y.jsonl", [row("2", 1.0)])
    assert data_check.run(data_check.DataCheckConfig(files=(path, some), on_bad_response="drop")) == 0
    assert "is left" not in capsys.readouterr().out


def test_prompts_only(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"prompt_id": "1", "prompt": "Hi"}])
    assert data_check.run(data_check.DataCheckConfig(files=(path,), form="prompts")) == 0
    assert data_check.run(data_check.DataCheckConfig(files=(path,))) == 2


def test_build_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "x.jsonl", [row(str(i), 1.0, 2.0 + i) for i in range(5)])
    tokenizer = make_tokenizer(tmp_path / "model", 300)
    (tokenizer / "config.json").write_text('{"vocab_size": 300}')
    config = build_command.CONFIG(inputs=(path,), output=tmp_path / "o", tokenizer=tokenizer, kind="pair", part="all")
    assert build_command.run(config) == 0
    assert ": written" in capsys.readouterr().out
    assert build_command.run(config) == 0
    assert "already there" in capsys.readouterr().out


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not beside the repository")
def test_real_data(capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "zh_fusion.jsonl.gz"
    report = check([path])
    assert (
        report.ok
        and (report.prompts, report.responses) == (115, 755)
        and report.sources["zh-alpaca-33b"].responses == 114
    )
    several = len(report.gaps) + report.no_pair["tie"] + report.no_pair["same_text"]
    assert several == 183, "the README's count of families with two or more answers"
    assert check([DATA / "alpacaeval_fusion.jsonl.gz"]).error_count == 16
    assert data_check.run(data_check.DataCheckConfig(files=(path,))) == 0
