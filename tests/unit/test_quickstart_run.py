"""The quick start's chain of commands, with a stand-in for each: which run, in which order, and at a second start."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megafuse.testing.examples import quickstart_module
from megafuse.testing.tiny import write_tiny_dataset

run = quickstart_module("run")


class Commands:
    """Writes what each command would, in the first of the folders that it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []
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
        self.flags.setdefault(name, []).append(given)
        getattr(self, name.replace(" ", "_"))(line, given)

    def build(self, line: list[str], given: dict[str, str]) -> None:
        out = Path(given["--output"])
        shutil.rmtree(out, ignore_errors=True)
        write_tiny_dataset(out, given["--kind"], seed=1, groups=int(given.get("--max_prompts", 20)), sources=2)

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
