"""Runs a Python program that nobody trusts, with a time limit, and says how it ended.

Covered, with bubblewrap: no network; no file of the machine but a read-only /usr and Python; an empty home of limited
size in memory; its own process ids, so that it sees and kills nothing outside; all of it gone when it ends, when its
time is up, or when this process dies. Covered by resource limits in both modes: CPU seconds, memory of a process, size
of a file, open files, and (not for a superuser who may not mount) the number of processes. Output is read up to a
limit and the program is then stopped.

Not covered: bugs of the kernel; covert channels such as load; a program that cheats the tests that it is run with.
Without bubblewrap it is NOT a sandbox: the program can read and write what the user can.
"""

import contextlib
import itertools
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megafuse.errors import ConfigError

Mode = Literal["root", "user", "none"]
_FIRST_UID, _UIDS = 61184, 4096  # a range that no distribution gives to people
_uids = itertools.count(os.getpid())
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONHASHSEED": "0",  # the order of sets must not decide whether a response passes
}


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    output_bytes: int = 1 << 20
    disk_bytes: int = 64 << 20


@dataclass(frozen=True)
class Ended:
    """How a program ended: `end` is exit, signal, timeout or output; `output` is what it wrote, cut at the limit."""

    end: str
    code: int
    output: bytes
    seconds: float


class Sandbox:
    """Runs programs. Threads may share one.

    Args:
        limits: of every program.
        unsafe: run programs as plain processes where there is no bubblewrap.

    Raises:
        ConfigError: there is no usable bubblewrap, and `unsafe` is not set.
    """

    def __init__(self, limits: Limits | None = None, *, unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self.mode = isolation()
        if self.mode == "none" and not unsafe:
            raise ConfigError(
                "responses' code runs in bubblewrap only, and `bwrap` is not there or may not make namespaces: install "
                "the package bubblewrap, or set unsafe_no_sandbox = true to run it WITHOUT isolation"
            )

    def run(self, program: str, stdin: bytes = b"") -> Ended:
        """Run Python source to its end or to a limit. Every process that it started is gone afterwards."""
        return _run(program, stdin, self.limits, self.mode)


@cache
def isolation() -> Mode:
    """What this machine offers: `root` and `user` are bubblewrap, for a superuser and with a user namespace."""
    modes: tuple[Mode, ...] = ("root", "user") if os.geteuid() == 0 else ("user",)
    if shutil.which("bwrap") is not None:
        for mode in modes:
            if _run("print(6 * 7)", b"", Limits(seconds=60), mode).output.strip() == b"42":
                return mode
    return "none"


def _run(program: str, stdin: bytes, limits: Limits, mode: Mode) -> Ended:
    with tempfile.TemporaryDirectory(prefix="megafuse-code-") as folder:
        source = Path(folder) / "program.py"
        # one uid a program: the number of processes is counted by uid, and one fork bomb must not starve the others
        uid = _FIRST_UID + next(_uids) % _UIDS if mode == "root" else None
        source.write_text(_PROLOGUE.format(uid=uid, processes=limits.processes, source=program), encoding="utf-8")
        os.chmod(source, 0o644)
        command = [sys.executable, "-s", str(source)]
        if mode != "none":
            command = bubblewrap_command(source, limits, mode)
        return _process(command, stdin, limits, folder)


# Runs first, in the sandbox: limits on the number of processes do not bind a superuser, and before the namespaces are
# made they would count every process of the user.
_PROLOGUE = """\
import os, resource
uid = {uid!r}
if uid is not None:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
resource.setrlimit(resource.RLIMIT_NPROC, ({processes}, {processes}))
exec(compile({source!r}, "program", "exec"), {{"__name__": "__main__"}})
"""


def _process(command: Sequence[str], stdin: bytes, limits: Limits, cwd: str) -> Ended:
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=_ENVIRONMENT,
        start_new_session=True,
        preexec_fn=_limiter(limits),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(stdin)
            process.stdin.close()
        end, output = _watch(process, started + limits.seconds, limits.output_bytes)
    finally:
        with contextlib.suppress(ProcessLookupError):  # in bubblewrap, its init dies of this, and all others of that
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if end == "exit" and process.returncode < 0:
        end = "signal"
    return Ended(end, process.returncode, output, time.monotonic() - started)


def _watch(process: "subprocess.Popen[bytes]", deadline: float, most: int) -> tuple[str, bytes]:
    """(end, output) of a process: it ended, or its time or its room for output did."""
    assert process.stdout is not None
    data = bytearray()
    gone = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            # a child that keeps the pipe open must not keep us, so look at the process itself now and then; what it
            # wrote before it went is still read
            if selector.select(0 if gone else min(left, 0.05)):
                block = os.read(process.stdout.fileno(), 1 << 16)
                data += block
                if len(data) > most:
                    return "output", bytes(data[:most])
                if not block:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
                        return "exit", bytes(data)
                    break
            elif gone:
                return "exit", bytes(data)
            else:
                gone = process.poll() is not None
    return "timeout", bytes(data)


def _limiter(limits: Limits) -> Callable[[], None]:
    """What the child does before it becomes the program."""
    pairs = [
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.disk_bytes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ]

    def apply() -> None:
        for name, value in pairs:
            hard = resource.getrlimit(name)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (value, value))

    return apply


def bubblewrap_command(source: Path, limits: Limits, mode: Mode) -> list[str]:
    """The command line that runs `source` with this Python and nothing else of the machine."""
    command = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if mode == "user":
        command += ["--unshare-all"]
    else:  # the prologue needs two capabilities, and loses them as it becomes another user
        command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    size = ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs"]
    command += [*size, "/tmp"]  # before this Python, which may live below it
    for root in sorted({Path("/usr"), Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve()}):
        for parent in reversed(root.parents[:-1]):  # bubblewrap would copy their modes, and /root is closed to others
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", str(root), str(root)]
    for link in ("bin", "lib", "lib64", "sbin"):
        path = Path("/", link)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--proc", "/proc", "--dev", "/dev", *size, "/dev/shm", "--remount-ro", "/dev"]
    command += ["--ro-bind", str(source), "/program.py", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, sys.executable, "-s", "/program.py"]
