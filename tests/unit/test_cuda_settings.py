"""What a process that computes on CUDA finds in its environment, wherever it is started."""

import subprocess
import sys
from pathlib import Path

import pytest

from megafuse.cli.main import COMMANDS
from megafuse.launch.environment import cuda_settings

COMMAND = """
import os, sys
seen = {k: os.environ.get(k) for k in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
print("torch" in sys.modules, seen)

from megafuse.config.base import Config
CONFIG, DESCRIPTION, run = Config, "Shows.", lambda config: 0
"""
START = (
    "import sys; from megafuse.cli.main import Command, main; main({argv}{{'show': Command('show', 's', None, {on})}})"
)


@pytest.mark.parametrize(
    ("torch", "name"), [("2.13.0+cu130", "PYTORCH_ALLOC_CONF"), ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF")]
)
def test_the_settings_are_those_of_the_torch_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, torch: str, name: str
) -> None:
    monkeypatch.setattr("megafuse.launch.environment.version", lambda package: torch)
    assert cuda_settings({}) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", name: "expandable_segments:True"}


def test_what_the_user_has_set_stays() -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert cuda_settings({name: "max_split_size_mb:64"}) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in cuda_settings({"CUDA_DEVICE_MAX_CONNECTIONS": "8"})


def test_a_command_that_computes_has_them_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(COMMAND)
    root = str(Path(__file__).resolve().parents[2])

    def shown(call: str, **environ: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = [{root!r}, {str(tmp_path)!r}]; {call}", "show"],
            env=environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone = shown(START.format(argv="commands=", on=True))
    assert "False {'CUDA_DEVICE_MAX_CONNECTIONS': '1', " in alone and "'expandable_segments:True'" in alone
    own = shown(START.format(argv="commands=", on=True), CUDA_DEVICE_MAX_CONNECTIONS="8", PYTORCH_ALLOC_CONF="x:1")
    assert "'8', 'PYTORCH_ALLOC_CONF': 'x:1', 'PYTORCH_CUDA_ALLOC_CONF': None" in own
    for elsewhere in (START.format(argv="commands=", on=False), START.format(argv="['show'], ", on=True)):
        assert "'CUDA_DEVICE_MAX_CONNECTIONS': None" in shown(elsewhere)  # another's engine, or another's process


def test_the_commands_that_compute_are_known() -> None:
    computing = {name for name, command in COMMANDS.items() if command.on_device}
    assert computing == {"train", "reference", "eval", "bench", "score", "convert verify", "doctor parity"}
