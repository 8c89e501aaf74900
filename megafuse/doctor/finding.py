"""One line of the doctor's report, and the guard that turns a crash of a probe into such a line."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """`absent` is something optional that is not there; `core` findings other than `ok` make megafuse unusable."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    core: bool = False


def guarded(name: str, probe: Callable[[], Finding], core: bool = False) -> Finding:
    """Run a probe; whatever it raises, SystemExit of a broken import included, is a finding."""
    try:
        return probe()
    except (Exception, SystemExit) as error:
        first = (str(error).splitlines() or [""])[0]
        return Finding(name, "problem", f"{type(error).__name__}: {first}"[:300], core=core)


def version(distribution: str) -> str | None:
    """Installed version of a distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def try_import(code: str, seconds: float = 120) -> str:
    """Run import statements in a child, which may hang or dump core; '' or the last line of its error."""
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)
    except subprocess.TimeoutExpired:
        return f"`{code}` took more than {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"`{code}` died with status {done.returncode}"]
    return lines[-1][:300]
