"""The quick start's chain of commands, with a stand-in for each: which run, in which order, and at a second start."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megafuse.data.reader import file_digest
from megafuse.errors import ConfigError, DataError
from megafuse.testing.examples import quickstart_module
from megafuse.testing.tiny import write_tiny_dataset

run = quickstart_module("run")


class Commands:
    """Writes what each command would, in the first of the folders that it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.threads: list[str] = []
        self.flags: dict[str, list[dict[str, str]]] = {}

    def __call__(self, *words: Any, check: bool = True) -> None:
        line = [str(word) for word in words]
        if line[0].endswith("target.py"):
            self.names.append("target")
            return
        line = line[len(line) - line[::-1].index("megafuse") :]
        name = " ".join(word for word in line[:2] if word.isalpha())
        given = {a: b for a, b in zip(line, [*line[1:], ""]) if a.startswith("--")}
        self.names.append(name)
        self.threads.append(os.environ["OMP_NUM_THREADS"])
        self.flags.setdefault(name, []).append(given)
        getattr(self, name.replace(" ", "_"))(line, given)

    def build(self, line: list[str], given: dict[str, str]) -> None:
        out = Path(given["--output"])
        shutil.rmtree(out, ignore_errors=True)
        write_tiny_dataset(out, given["--kind"], seed=1, groups=int(given.get("--max_prompts", 20)), sources=2)
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["inputs"] = [{"sha256": file_digest(Path(given["--inputs"]))}]
        manifest["config"] = {"seed": int(given["--seed"]), "reward_field": given["--reward_field"]}
        manifest["config"]["alpha"] = float(given.get("--alpha", "nan"))
        (out / "manifest.json").write_text(json.dumps(manifest))

    def convert_import(self, line: list[str], given: dict[str, str]) -> None:
        Path(line[-1]).mkdir()

    def convert_export(self, line: list[str], given: dict[str, str]) -> None:
        Path(line[-1]).mkdir()

    def bench(self, line: list[str], given: dict[str, str]) -> None:
        result = {"prompts": int(given["--global_batch_size"]), "step_seconds": 8.0, "tokens_per_second": 0.5}
        config = {"steps": 1, "warmup": 1, "model": {"precision": "fp32"}}
        Path(given["--out"]).write_text(json.dumps({"results": [result], "config": config}))

    def reference(self, line: list[str], given: dict[str, str]) -> None:
        Path(given["--out"]).mkdir(exist_ok=True)

    def train(self, line: list[str], given: dict[str, str]) -> None:
        folder = Path(given["--run_dir"])
        (folder / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens_per_second": 90.0}) + "\n")

    def eval(self, line: list[str], given: dict[str, str]) -> None:
        out = Path(given["--out"])
        out.mkdir(parents=True, exist_ok=True)
        pooled = {"best_logp": -1.0, "worst_logp": -2.0}
        facts = {"intra": 0.5, "cross": {"accuracy": 0.5}, "per_source": {}, "intra_pooled": pooled}
        (out / "accuracy.json").write_text(json.dumps(facts))


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Commands:
    commands = Commands()
    monkeypatch.setattr(run, "python", commands)
    monkeypatch.setattr(run, "plot_run", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--run", str(folder / "run"), *flags])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the program sets it: not for the tests that follow
    monkeypatch.chdir(folder)
    args: argparse.Namespace = run.arguments()
    run.pipeline(args)
    return commands


def test_a_step_is_measured_before_prompts_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path, monkeypatch)
    at = first.names.index("bench")
    assert first.names[:at] == ["target", "build", "build", "build", "convert import"]
    after = first.names[at + 1 :]
    assert after[:3] == ["build", "build", "build"]  # cut to the time
    assert after[3:] == ["eval", "train", "eval", "reference", "train", "eval", "convert export"]
    assert len(after[3:]) + 1 == run.budget.LAUNCHES
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    taken = summary["budget"]["plan"]["prompts"]
    assert [flags["--max_prompts"] for flags in first.flags["build"][3:]] == [str(n) for n in taken.values()]
    assert (tmp_path / "run" / "summary.md").is_file()


def test_a_second_start_keeps_the_prompts_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, monkeypatch)
    kept = (tmp_path / "run" / "budget.json").read_bytes()
    again = start(tmp_path, monkeypatch, "--minutes", "90")
    assert "bench" not in again.names and "build" not in again.names
    assert (tmp_path / "run" / "budget.json").read_bytes() == kept


def test_what_is_measured_costs_what_a_step_does(tmp_path: Path) -> None:
    pairs = write_tiny_dataset(tmp_path / "pair", "pair", seed=3, groups=40, sources=3)
    sources, prompts = run.alike(pairs, 8)
    assert sources == 1 and 9 <= prompts <= 24  # a prompt has two pairs on average: twice as many prompts of one
    fixed = write_tiny_dataset(tmp_path / "fixed", "pair", seed=3, groups=5, sources=3, responses=2)
    assert run.alike(fixed, 8) == (3, 5)


def scored(path: Path, prompts: int) -> Path:
    lines = []
    for i in range(prompts):
        answers = [{"source": name, "text": f"{name} {j}", "reward": i + j} for name in "ab" for j in range(2)]
        lines.append(json.dumps({"prompt_id": f"p{i}", "prompt": "?", "responses": answers}))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_another_file_of_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = scored(tmp_path / "mine" / "a.jsonl", 20), scored(tmp_path / "other" / "a.jsonl", 21)
    start(tmp_path, monkeypatch, "--data", str(mine))
    copy = str(shutil.copy(mine, tmp_path / "copy.jsonl"))
    assert "build" not in start(tmp_path, monkeypatch, "--data", copy).names  # the same bytes: the same quick start
    for flags, what in (
        (["--data", str(other)], "data: '"),
        (["--data", str(mine), "--seed", "1"], "seed: 0, now 1"),
        (["--data", str(mine), "--reward-field", "logit"], None),
    ):
        with pytest.raises(ConfigError if what else DataError, match=what or "no response has a number as 'logit'"):
            start(tmp_path, monkeypatch, *flags)


def test_before_a_step_is_measured_other_data_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise DataError("no group is left")

    data = scored(tmp_path / "a.jsonl", 3)
    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(run, "fit", fail)
        start(tmp_path, patch, "--data", str(data))
    found = start(tmp_path, monkeypatch, "--data", str(scored(data, 20)))
    assert found.names[:5] == ["target", "build", "build", "build", "bench"]
    made = [json.loads(path.read_text())["inputs"] for path in sorted(tmp_path.glob("run/data/*/manifest.json"))]
    assert made == [[{"sha256": file_digest(data)}]] * 3


def test_bad_lines_are_left_to_build(tmp_path: Path) -> None:
    path = scored(tmp_path / "a.jsonl", 4)
    good = run.reward_scale(path, None)
    bad = ["{broken", "[1]", "7", '{"prompt_id": "x"}', '{"responses": 3}', '{"responses": [3, {"reward": "a"}]}']
    path.write_text("\n".join([bad[0], path.read_text(), *bad[1:]]))
    assert run.reward_scale(path, None) == good
    (tmp_path / "bad.jsonl").write_text("\n".join(bad))
    with pytest.raises(DataError, match=r"bad\.jsonl:1:2"):
        run.reward_scale(tmp_path / "bad.jsonl", None)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--processes", "0", "at least 1"),
        ("--batch", "0", "at least 1"),
        ("--seed", "-1", "at least 0"),
        ("--minutes", "nan", "above 0"),
        ("--budget", "0", "above 0"),
        ("--po-lr", "inf", "above 0"),
        ("--beta", "x", "invalid"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_flag(
    flag: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", flag, value])
    with pytest.raises(SystemExit) as stopped:
        run.arguments()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert flag in said and message in said


def test_a_run_folder_that_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()
    monkeypatch.setattr(sys, "argv", ["run.py", "--run", str(tmp_path / "run")])
    assert run.main() == 1
    assert "quick start stopped" in capsys.readouterr().err


def test_what_was_used_of_the_time_is_not_planned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def plan(sizes: Any, speed: Any, seconds_left: float) -> Any:
        given.append(seconds_left)
        return run.budget.scaled(sizes, speed, 0.05)

    now = run.time.monotonic()
    ticks = iter([now, *(now + 240.0 for _ in range(99))])  # four minutes pass after the start
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(run.budget, "plan", plan)
    monkeypatch.setattr(run, "usable_cores", lambda: 6)
    commands = start(tmp_path, monkeypatch, "--minutes", "15", "--processes", "2")
    assert given == [11 * 60.0]
    alone = dict(zip(commands.names[1:], commands.threads))
    assert alone["train"] == alone["bench"] == "3" and alone["build"] == "6"  # of two processes, of one


def test_little_time_and_few_prompts_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, monkeypatch, "--minutes", "0.5")
    found = capsys.readouterr()
    assert "more than --minutes 0.5 leaves" in found.err
    assert "1 held-out prompts are too few" in found.err and "on 1 held-out prompts" in found.out.replace("\n", " ")
