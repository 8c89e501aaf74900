"""Tables are whole where no terminal limits them, and one place decides that."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megafuse.testing.tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LONG = "a-source-whose-name-has-more-letters-than-eighty-columns-" + "x" * 120
CONSOLES = {"megafuse/observe/console.py", "megafuse/observe/progress.py"}  # the second draws bars, no tables


def megafuse(*words: object, folder: Path, **environment: str) -> str:
    """Standard output of a command whose output is a pipe."""
    run = [sys.executable, "-m", "megafuse", *map(str, words)]
    here = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "40", "PYTHONSAFEPATH": "1"} | environment
    done = subprocess.run(run, cwd=folder, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scored.jsonl"
    with path.open("w") as file:
        for i in range(12):
            responses = [
                {"source": source, "text": f"{i} {n} words", "reward": 12345678.0 * (i + n)}
                for source in (LONG, "b")
                for n in range(2)
            ]
            record = {"prompt_id": f"p{i}", "prompt": f"question {i}", "domain": f"{LONG}-domain", "dataset": LONG}
            file.write(json.dumps(record | {"responses": responses}) + "\n")
    return path


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_names_and_numbers_are_whole_in_a_pipe(scored: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    shown = re.sub(r"\x1b\[[\d;]*m", "", megafuse("data", "check", scored, folder=tmp_path, **environment))
    row = next(line for line in shown.splitlines() if LONG in line and "-domain" not in line)
    assert re.search(r"\b24\b.*7\.407e\+07.*1\.481e\+08", row) and f"prompts of domain {LONG}-domain" in shown


def test_of_every_command_with_tables(scored: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    build = ["--tokenizer", tokenizer, "--kind", "pair", "--alpha", 1, "--vocab_size", 512]
    shown = megafuse("build", "--inputs", scored, "--output", tmp_path / "built", *build, folder=tmp_path)
    assert f"{LONG}-domain" in shown and LONG in shown
    shown = megafuse(
        "score", "--inputs", scored, "--output", tmp_path / "out.jsonl", "--reward", "keep", folder=tmp_path
    )
    assert "without_reward" in shown or "rewarded" in shown


def test_a_terminal_has_its_width(scored: Path, tmp_path: Path) -> None:
    """The same command at a real terminal: no line is longer than it."""
    ours, theirs = pty.openpty()
    run = [sys.executable, "-m", "megafuse", "data", "check", str(scored)]
    here = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "40", "TERM": "xterm", "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(run, cwd=tmp_path, env=here, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 1 << 16):
                shown += block
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "").splitlines()
    assert len(lines) > 20 and max(map(len, lines)) <= 40


def test_nobody_else_makes_a_console() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("megafuse", "launch", "converters", "kernels", "examples")
        for path in (ROOT / top).rglob("*.py")
        if re.search(r"\bConsole\((?!\))|\bConsole\(\)", path.read_text())
    }
    assert found == CONSOLES
