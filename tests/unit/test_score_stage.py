"""`score` as a stage: joined inputs, chunks that survive kill -9, two jobs, damaged chunks, a judge over HTTP."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megafuse.cli.main import main
from megafuse.config.load import validate
from megafuse.config.score import ScoreConfig
from megafuse.errors import ConfigError, DataError
from megafuse.rewards.join import join
from megafuse.rewards.score import score
from megafuse.testing.server import ChatServer


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(n: int, source: str = "a") -> list[dict[str, Any]]:
    """Gold answers that are plain numbers: they are compared without math-verify."""
    texts = [r"\boxed{%d}", r"\boxed{%d.0}", '{"answer": "1%d"}']
    return [
        {
            "prompt_id": f"p{i}",
            "prompt": f"question {i}",
            "domain": "math",
            "gold": str(i),
            "mine": [i],
            "responses": [{"source": source, "text": t % i, "note": n} for n, t in enumerate(texts)],
        }
        for i in range(n)
    ]


def config(inputs: list[Path], output: Path, **more: Any) -> ScoreConfig:
    values = {"inputs": inputs, "output": output, "reward": "correct", "workers": 2, "chunk": 2}
    return validate(ScoreConfig, {**values, **more})


@pytest.fixture(autouse=True)
def _math(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")


def test_verdicts_are_written_and_nothing_else_changes(tmp_path: Path) -> None:
    given = rows(5)
    result = score(config([write(tmp_path / "a.jsonl", given)], tmp_path / "out.jsonl"))
    assert result.complete and result.made == 3
    found = read(tmp_path / "out.jsonl")
    for old, new in zip(given, found):
        assert [r["correct"] for r in new["responses"]] == [True, True, False]
        assert [r["reward"] for r in new["responses"]] == [1.0, 1.0, 0.0]
        stripped = [{k: r[k] for k in ("source", "text", "note")} for r in new["responses"]]
        assert {**new, "responses": stripped} == old
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["counts"]["verdict.right"] == 10 and manifest["counts"]["responses"] == 15
    assert score(config([tmp_path / "a.jsonl"], tmp_path / "out.jsonl")).made == 0


SLOW = """
import sys, time
import megafuse.rewards.score as s
real = s._scored
def slow(*args):
    time.sleep(0.2)
    return real(*args)
s._scored = slow
from megafuse.cli.main import main
sys.exit(main(["score", *sys.argv[1:]]))
"""


def test_killed_and_started_again_it_is_byte_identical(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(24))
    flags = ["--inputs", str(source), "--reward", "correct", "--workers", "1", "--chunk", "2"]
    assert main(["score", *flags, "--output", str(tmp_path / "whole.jsonl")]) == 0
    out = tmp_path / "killed.jsonl"
    chunks = tmp_path / "killed.jsonl.chunks"
    for wanted in (1, 5):
        command = [sys.executable, "-c", SLOW, *flags, "--output", str(out)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        )
        deadline = time.monotonic() + 120
        while len(list(chunks.glob("?????.jsonl"))) < wanted and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.random() / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    left = len(list(chunks.glob("?????.jsonl")))
    assert 5 <= left < 12
    assert score(config([source], out, workers=1)).made == 12 - left
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_jobs_share_the_work(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(9))
    score(config([source], tmp_path / "one.jsonl"))
    made = [score(config([source], tmp_path / "two.jsonl", job=job, jobs=2)) for job in (0, 1)]
    assert [(m.made, m.complete) for m in made] == [(3, False), (2, True)]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_ranks_of_torchrun_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = write(tmp_path / "a.jsonl", rows(9)), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        made.append(score(config([source], tmp_path / "out.jsonl", job=0, jobs=1)))
    assert [(m.made, m.complete) for m in made] == [(2, False), (3, True)]


def test_two_jobs_on_one_chunk(tmp_path: Path) -> None:
    from megafuse.data.chunks import ChunkedStage

    records = rows(3)
    stage = ChunkedStage(tmp_path / "x.jsonl", {}, records, chunk=2)
    with stage.claim(0), pytest.raises(DataError, match=f"chunk 0 .* process {os.getpid()} on"), stage.claim(0):
        pass
    with stage.claim(0), stage.claim(1):
        stage.write(1, records[2:])
    assert stage.pending() == [0]


def test_damaged_chunks_are_made_again(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(6))
    score(config([source], tmp_path / "out.jsonl"))
    whole = (tmp_path / "out.jsonl").read_bytes()
    chunks = tmp_path / "out.jsonl.chunks"
    (chunks / "00000.jsonl").write_bytes((chunks / "00000.jsonl").read_bytes()[:-30])
    (chunks / "00001.jsonl").write_bytes((chunks / "00002.jsonl").read_bytes())
    (chunks / ".00002.jsonl.1234.tmp").write_bytes(b"half a li")
    (tmp_path / "out.jsonl").unlink()
    result = score(config([source], tmp_path / "out.jsonl"))
    assert result.made == 2 and [p.name for p in result.damaged] == ["00000.damaged", "00001.damaged"]
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_another_runs_chunks_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(4))
    score(config([source], tmp_path / "out.jsonl"))
    for more, word in (
        ({"math_seconds": 3.0}, r"\(settings\.math_seconds: 20\.0 then, 3\.0 now\)"),
        ({"chunk": 3, "max_length": 9}, r"\(chunk: 2 then, 3 now; settings\.max_length: 4096 then, 9 now\)"),
    ):
        with pytest.raises(DataError, match=word):
            score(config([source], tmp_path / "out.jsonl", **more))
    write(source, rows(5))
    with pytest.raises(DataError, match="inputs"):
        score(config([source], tmp_path / "out.jsonl"))
    shutil.rmtree(tmp_path / "out.jsonl.chunks")
    with pytest.raises(DataError, match="made otherwise"):
        score(config([source], tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl.chunks").exists()


def test_a_run_that_made_nothing_does_not_lock_the_output(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows(4))
    with pytest.raises(ConfigError, match="not a folder"):
        score(config([source], tmp_path / "out.jsonl", reward="classifier", model=tmp_path / "absent"))
    assert score(config([source], tmp_path / "out.jsonl")).complete


def test_a_job_at_work_keeps_the_output(tmp_path: Path) -> None:
    from megafuse.data.chunks import ChunkedStage

    records = rows(3)
    one = ChunkedStage(tmp_path / "x.jsonl", {"a": {"b": "z" * 99 + "1"}}, records, chunk=2)
    with one.claim(1), pytest.raises(DataError, match=r'a\.b: \.\.\.z{10}1" then, \.\.\.z{10}2" now'):
        ChunkedStage(tmp_path / "x.jsonl", {"a": {"b": "z" * 99 + "2"}}, records, chunk=2)
    other = ChunkedStage(tmp_path / "x.jsonl", {"a": 2}, records, chunk=2)  # nobody works there, nothing is done
    with pytest.raises(DataError, match="a: 2 then, "), one.claim(0):
        pass
    with other.claim(0):
        other.write(0, records[:2])
    with pytest.raises(DataError, match="chunks of another run"):
        ChunkedStage(tmp_path / "x.jsonl", {"a": 3}, records, chunk=2)


def test_a_chunk_that_another_job_made_meanwhile_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megafuse.rewards.score as score_module

    source, out = write(tmp_path / "a.jsonl", rows(6)), tmp_path / "out.jsonl"
    others: dict[Path, int] = {}
    real = score_module._scored

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(score_module, "_scored", real)
        assert score(config([source], out, job=1, jobs=3)).made == 1  # while the first makes its first chunk
        others.update({p: p.stat().st_mtime_ns for p in tmp_path.glob("out.jsonl.chunks/?????.jsonl")})
        return real(*args)

    monkeypatch.setattr(score_module, "_scored", slow)
    assert score(config([source], out)).made == 2
    assert len(others) == 1 and all(p.stat().st_mtime_ns == t for p, t in others.items())


def test_files_are_joined_by_prompt(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(4, "b")[::-1])
    found = join([one, two])
    assert [r["prompt_id"] for r in found] == ["p0", "p1", "p2", "p3"]
    assert [r["source"] for r in found[0]["responses"]] == ["a"] * 3 + ["b"] * 3
    other = rows(3, "c")
    other[1]["prompt"] = "something else"
    strangers = [{**r, "prompt_id": f"q{n}"} for n, r in enumerate(rows(3, "c"))]
    for bad, word in (
        (other, "is not the prompt of that name"),
        (strangers, "shares no prompt"),
        (rows(3), "source 'a'"),
    ):
        with pytest.raises(DataError, match=word):
            join([one, write(tmp_path / "c.jsonl", bad)])
    with pytest.raises(DataError, match="'p3', which is not in"):
        join([two], one)
    (tmp_path / "d.jsonl").write_text('{"prompt_id": "p0"')
    with pytest.raises(DataError, match=r"d\.jsonl:1:"):
        join([tmp_path / "d.jsonl"])


def test_given_labels_are_compared(tmp_path: Path) -> None:
    given = rows(2)
    for row in given:
        for response in row["responses"]:
            response["correct"] = True
    score(config([write(tmp_path / "a.jsonl", given)], tmp_path / "out.jsonl", compare=True))
    listed = read(tmp_path / "out.jsonl.disagreements.jsonl")
    assert [(r["prompt_id"], r["given"], r["found"]) for r in listed] == [("p0", True, False), ("p1", True, False)]


def test_a_judge_over_http(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        text = body["messages"][0]["content"]
        assert body["temperature"] == 0 and "question 0" in text
        return "no idea" if "1.0}" in text or '"10"' in text else "Fine. Rating: [[7.5]]"

    source = write(tmp_path / "a.jsonl", rows(1))
    with ChatServer(answer, failures=2) as server:
        more = {"reward": "judge", "base_url": server.url, "retries": 3, "request_seconds": 20.0}
        score(config([source], tmp_path / "out.jsonl", **more))
        assert server.requests >= 5, "two of them were refused for a while"
    responses = read(tmp_path / "out.jsonl")[0]["responses"]
    assert [r["reward"] for r in responses] == [7.5, 7.5, None] and responses[2]["unscored"] == "no_rating"


def test_settings_are_checked(tmp_path: Path) -> None:
    for more, word in (({"reward": "armorm"}, "model = FOLDER"), ({"job": 2, "jobs": 2}, "below jobs")):
        with pytest.raises(ConfigError, match=word):
            config([tmp_path / "a"], tmp_path / "b", **more)


@pytest.mark.parametrize("device", ["cuda:77", "foo", "cuda:x"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    source = write(tmp_path / "a.jsonl", rows(1))
    more = {"reward": "classifier", "model": tmp_path, "verify": "none", "device": device}
    with pytest.raises(ConfigError, match=rf"device = '{device}' cannot be used \(.+\); there is cpu"):
        score(config([source], tmp_path / "out.jsonl", **more))
