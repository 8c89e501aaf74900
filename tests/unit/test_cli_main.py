"""The executable: finding commands, lazy imports, exit statuses, messages."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megafuse import __version__
from megafuse.cli.main import COMMANDS, Command, main

ROOT = Path(__file__).resolve().parents[2]
FAKE = '''
import errno
from megafuse.config.base import Config
from megafuse.errors import DataError, NonFiniteError

DESCRIPTION = "Raises what it is told to."

class FakeConfig(Config):
    how: str
    """What to do."""

CONFIG = FakeConfig

def run(config):
    if config.how == "data":
        raise DataError("prompts.jsonl:3: no field 'prompt'")
    if config.how == "nan":
        raise NonFiniteError("loss is nan at step 7")
    if config.how == "ctrl-c":
        raise KeyboardInterrupt
    if config.how == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "out.jsonl")
    if config.how == "folder":
        open("/")
    if config.how == "network":
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    if config.how == "much":
        print("line " * 100_000)
    print("ran", config.how)
    return 5 if config.how == "five" else 0

COMMANDS = {"one": (FakeConfig, run)}
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    (tmp_path / "fake_command.py").write_text(FAKE)
    (tmp_path / "needy_command.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_command", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return {
        "fake": Command("fake_command", "fakes"),
        "family one": Command("fake_command", "the first", "one"),
        "needy": Command("needy_command", "needs"),
    }


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        (["fake", "--how", "well"], 0, "ran well\n", ""),
        (["fake", "--how", "five"], 5, "ran five\n", ""),
        (["family", "one", "--how", "well"], 0, "ran well\n", ""),
        (
            ["fake", "--how", "disk"],
            4,
            "",
            "error: out.jsonl: the disk is full (No space left on device); free some of it, or write to another one\n",
        ),
        (["fake", "--how", "folder"], 2, "", "error: /: Is a directory\n"),
        (["fake", "--how", "data"], 2, "", "error: prompts.jsonl:3: no field 'prompt'\n"),
        (["fake", "--how", "nan"], 86, "", "error: loss is nan at step 7\n"),
        (["fake", "--how", "ctrl-c"], 130, "", "error: interrupted\n"),
        (["fke"], 2, "", "error: unknown command 'fke'; did you mean `megafuse fake`?\n"),
        (["family", "won"], 2, "", "error: unknown command 'family won'; did you mean `megafuse family one`?\n"),
        (["xyz"], 2, "", "error: unknown command 'xyz'; `megafuse --help` lists the commands\n"),
        (["needy"], 1, "", "error: megafuse needy needs the package no_such_package: run `megafuse doctor`\n"),
    ],
)
def test_status_and_streams(
    fake: dict[str, Command], capsys: pytest.CaptureFixture[str], argv: list[str], status: int, out: str, err: str
) -> None:
    assert main(argv, fake) == status
    assert tuple(capsys.readouterr()) == (out, err)


def test_what_no_message_can_explain_keeps_its_traceback(fake: dict[str, Command], monkeypatch) -> None:
    with pytest.raises(ConnectionResetError):
        main(["fake", "--how", "network"], fake)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a shared file system that is away for a moment: the job is tried again
    with pytest.raises(IsADirectoryError):
        main(["fake", "--how", "folder"], fake)


def test_a_reader_that_has_gone_is_no_error(fake: dict[str, Command], tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from megafuse.cli.main import Command, main; "
        "sys.exit(main(['fake', '--how', 'much'], {'fake': Command('fake_command', 'fakes')}))"
    )
    line = f'{sys.executable} -c "$1" {tmp_path} | head -c 5; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line, "bash", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (141, "line ", "")


def test_help_of_all_of_a_family_and_of_one_command(
    fake: dict[str, Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"], fake) == 0 and main([], fake) == 2
    assert capsys.readouterr().out.count("  family one  the first\n") == 2
    assert main(["family", "--help"], fake) == 0 and main(["family"], fake) == 2
    assert "fakes" not in capsys.readouterr().out
    assert main(["fake", "--help"], fake) == 0
    assert "What to do. (required)" in capsys.readouterr().out
    assert main(["fake"], fake) == 2
    assert "--how" in capsys.readouterr().err


def test_a_wrong_file_is_one_message(
    fake: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text("hwo = 'x'")
    assert main(["fake", str(path)], fake) == 2
    assert capsys.readouterr().err == f"error: {path}: unknown field hwo = 'x'; did you mean how?\n"


def test_ranks_of_one_node_print_a_message_once(
    fake: dict[str, Command],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, how in (("2", "data"), ("0", "data"), ("1", "nan")):
        monkeypatch.setenv("RANK", rank)
        assert main(["fake", "--how", how], fake) in (2, 86)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: [rank 2] prompts.jsonl:3: no field 'prompt'", "error: [rank 1] loss is nan at step 7"]
    for claim in tmp_path.glob("megafuse-*"):  # left by a run of long ago whose process id is used again
        os.utime(claim, (0, 0))
    assert main(["fake", "--how", "nan"], fake) == 86
    assert "loss is nan" in capsys.readouterr().err


def test_help_imports_nothing_heavy_and_lists_every_command() -> None:
    code = (
        "import sys; from megafuse.cli.main import main; status = main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'tyro'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout and command.summary in done.stdout


def test_version_and_python_dash_m() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megafuse", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout == (
        f"megafuse {__version__}\n"
    )
