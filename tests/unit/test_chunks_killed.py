"""`sample` and `score` killed with SIGKILL before random lines of what writes their chunks, and started again."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import megafuse.rewards.score as score_module
from megafuse.config.load import validate
from megafuse.config.sample import SampleConfig
from megafuse.config.score import ScoreConfig
from megafuse.data.chunks import ChunkedStage
from megafuse.errors import DataError
from megafuse.sampling.engines import Generated, Request
from megafuse.sampling.sample import sample

ODD = "\u2028 \u2029 \x85 \x0b \x0c \x1c \r\n \x00 \U0001f600"  # some of them are line ends to str.splitlines
WATCHED = ("data/chunks.py", "observe/manifest.py", "sampling/sample.py", "rewards/score.py")
MOMENTS = 16


class Echo:
    """An engine whose responses tell what was asked for."""

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        return [Generated(f"{r.messages[-1]['content']}{ODD}{r.seed}", "stop", 4) for r in requests]


def lines_of(work: Callable[[], object], kill_at: int | None = None) -> int:
    """Run `work` in a fork; how many lines of the watched modules it ran, or -1 where it was killed before one."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.endswith(WATCHED):
                return None
            if event == "line":
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return trace

        sys.settrace(trace)
        work()
        sys.settrace(None)
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == (0 if text else signal.SIGKILL)
    return int(text or -1)


def prompts(path: Path, n: int) -> Path:
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"question {i} {ODD}", **({} if i else {"own": "half of \ud83d"})}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampling(source: Path, output: Path) -> Callable[[], Any]:
    values = {"prompts": (source,), "output": output, "source": "me", "engine": "server", "chunk": 2, "n": 2}
    return lambda: sample(validate(SampleConfig, values), engine=Echo())


def scoring(source: Path, output: Path) -> Callable[[], Any]:
    values = {"inputs": (source,), "output": output, "reward": "judge", "judge_model": "j", "chunk": 2}
    return lambda: score_module.score(validate(ScoreConfig, values))


@pytest.fixture(params=["sample", "score"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Output path -> the stage that writes it."""
    source = prompts(tmp_path / "prompts.jsonl", 5)
    if request.param == "sample":
        return lambda output: sampling(source, output)

    def scorer(part: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[{"reward": float(len(r["text"]) + n)} for n, r in enumerate(p["responses"])] for p in part]

    monkeypatch.setattr(score_module, "_scorers", lambda *_: [scorer])
    sampling(source, tmp_path / "responses.jsonl")()
    return lambda output: scoring(tmp_path / "responses.jsonl", output)


def test_killed_before_any_line_it_ends_with_the_same_bytes(stage: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = stage(tmp_path / "whole.jsonl")()
    assert whole.made == 3 and whole.complete
    wanted = (tmp_path / "whole.jsonl").read_bytes()
    total = lines_of(stage(tmp_path / "counted.jsonl"))
    assert total > 100 and (tmp_path / "counted.jsonl").read_bytes() == wanted
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    left = set()
    for moment in sorted(random.Random(seed).sample(range(total), MOMENTS)):
        output = tmp_path / f"killed-{moment}.jsonl"
        chunks = tmp_path / f"killed-{moment}.jsonl.chunks"
        assert lines_of(stage(output), moment) == -1
        done = {path: path.stat() for path in chunks.glob("?????.jsonl")}
        again = lines_of(stage(output), moment)  # it may be killed a second time, further on
        result = stage(output)()
        assert result.complete and not result.damaged, f"killed before line {moment}"
        assert output.read_bytes() == wanted, f"killed before line {moment}"
        assert all(path.stat().st_mtime_ns == old.st_mtime_ns for path, old in done.items()), "what is done stays"
        left.add((len(done), again == -1))
    assert len({number for number, _ in left}) > 1, "kills at several states"


def test_texts_that_break_lines_are_no_damage(tmp_path: Path) -> None:
    records = [{"prompt_id": "p0"}, {"prompt_id": "p1"}]
    rows = [{**record, "responses": [{"text": ODD}]} for record in records]
    once = ChunkedStage(tmp_path / "out.jsonl", {}, records, chunk=2)
    once.write(0, rows)
    again = ChunkedStage(tmp_path / "out.jsonl", {}, records, chunk=2)
    assert again.pending() == [] and again.rows(0) == rows and not again.damaged


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_half_written_chunk_is_set_aside(tmp_path: Path, cut: int) -> None:
    records = [{"prompt_id": "p0"}, {"prompt_id": "p1"}]
    stage = ChunkedStage(tmp_path / "out.jsonl", {}, records, chunk=2)
    stage.write(0, [{**record, "text": ODD} for record in records])
    whole = stage.path(0).read_bytes()
    stage.path(0).write_bytes(whole[:-cut])
    assert stage.pending() == [0] and [path.read_bytes() for path in stage.damaged] == [whole[:-cut]]


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    stage = ChunkedStage(tmp_path / "out.jsonl", {}, [{"prompt_id": "p0"}], chunk=2)
    with pytest.raises(DataError, match=r"chunk 0 of .*out"):
        stage.write(0, [{"prompt_id": "p0", "responses": [{"reward": float("nan")}]}])
    assert stage.pending() == [0] and not list(stage.folder.glob("*.tmp"))
