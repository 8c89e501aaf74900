"""Code as a reward: right solutions pass, hostile ones fail within their time, and nothing of them is left."""

import gzip
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megafuse.errors import ConfigError, DataError
from megafuse.rewards import sandbox as sandbox_module
from megafuse.rewards.code import extract_code, grade_code, static_problem
from megafuse.rewards.sandbox import Limits, Sandbox, isolation

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "mbpp_tests.jsonl.gz"
TESTS = {"code": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "double"}
GOOD = "def double(x):\n    return 2 * x\n"
needs_bubblewrap = pytest.mark.skipif(isolation() == "none", reason="bubblewrap is not installed or may not be used")


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(Limits(seconds=20))


@needs_bubblewrap
@pytest.mark.parametrize(
    ("text", "passed", "verdict"),
    [
        (GOOD, True, "passed"),
        (f"Here:\n```python\n{GOOD}```\nand a test\n```python\nprint(double(3))\n```", True, "passed"),
        (f"```python\nprint('first')\n```\n```py\n{GOOD}", True, "passed"),
        (GOOD + "print('noise')\nif __name__ == '__main__':\n    input()\n", True, "passed"),
        ("def double(x):\n    return x * x + 1\n", False, "failed"),
        ("def double(x)\n    return 2 * x\n", False, "syntax"),
        ("def triple(x):\n    return 3 * x\n", False, "no_entry_point"),
        ("", False, "no_entry_point"),
        ("double = lambda x: 2 * x", True, "passed"),
    ],
)
def test_verdicts(box: Sandbox, text: str, passed: bool, verdict: str) -> None:
    assert grade_code(box, text, TESTS) == (passed, verdict)


def test_code_is_found_and_read_before_it_runs() -> None:
    assert extract_code("no fence") == "no fence"
    assert extract_code("```bash\nls\n```\n```python\nx = 1\n```") == "x = 1\n"
    assert static_problem("def f(:", None) == "syntax" and static_problem("x = 1\x00", None) == "syntax"
    assert static_problem("class A:\n    def f(self): ...", "A().f") == ""
    assert static_problem("from math import gcd as g", "g") == ""


@needs_bubblewrap
def test_the_solutions_of_mbpp_pass(box: Sandbox) -> None:
    if not DATA.exists():
        pytest.skip("the shared data is not beside the repository")
    rows = [
        json.loads(line) for line in gzip.decompress(DATA.read_bytes()).splitlines()[::3]
    ]  # all of them took 15 s, and passed
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda r: grade_code(box, r["gold"], r["tests"]), rows))
    assert len(rows) > 90 and all(passed for passed, _ in found), [
        (r["prompt_id"], f) for r, f in zip(rows, found) if not f[0]
    ]


OUTSIDE = "/var/tmp/megafuse-hostile-{pid}"
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "10 GB": "x = bytearray(10 << 30)",
    "10 GB in pieces": "x = []\nwhile True:\n    x.append(bytearray(64 << 20))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "endless loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(10**6)",
    "ignores signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "1 GB of output": "for _ in range(1 << 10):\n    print('x' * (1 << 20))",
    "1 GB of errors": "import sys\nfor _ in range(1 << 10):\n    sys.stderr.write('x' * (1 << 20))",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1).send(b'hello')",
    "reads a file outside": "open('{canary}').read()",
    "writes a file outside": "open('{outside}', 'w').write('x')",
    "deletes outside": "import os\nos.remove('{canary}')",
    "reads passwords": "open('/etc/shadow').read()",
    "fills the disk": "n = 0\nwhile True:\n    open(f'/tmp/{{n}}', 'wb').write(b'x' * (1 << 25)); n += 1",
    "fills shared memory": "n = 0\nwhile True:\n    open(f'/dev/shm/{{n}}', 'wb').write(b'x' * (1 << 25)); n += 1",
    "kills the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill({pid}, 9)\nos.kill(-1, 9)",
    "a daemon stays": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        time.sleep(600)\n    os._exit(0)\ntime.sleep(600)",
    "leaves early": "import os\nos._exit(0)",
    "exits well": "import sys\nsys.exit(0)",
    "prints a pass": "import os\nprint('passed')\nos.write(1, b'\\n' + b'0' * 32 + b'\\n')\nos._exit(0)",
    "becomes root": "import os\nos.setuid(0)\nos.setgid(0)\nopen('/usr/x', 'w')",
    "kernel": "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')",
}


@needs_bubblewrap
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code(name: str, tmp_path: Path) -> None:
    """Each fails within its limit and a second; nothing survives, nothing outside is touched."""
    limits = Limits(seconds=2)
    outside, canary = Path(OUTSIDE.format(pid=os.getpid())), tmp_path / "canary"
    canary.write_text("untouched")
    os.chmod(tmp_path, 0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        places = {"port": server.getsockname()[1], "outside": outside, "canary": canary, "pid": os.getpid()}
        code = GOOD + HOSTILE[name].format(**places)
        for _ in range(3):  # other programs may keep the machine from ending this one in time: once is enough
            started = time.monotonic()
            passed, verdict = grade_code(Sandbox(limits), code, TESTS)
            took = time.monotonic() - started
            if took <= limits.seconds + 1:
                break
        with pytest.raises(TimeoutError):
            server.accept()
    assert not passed and verdict in ("failed", "timeout", "output", "killed")
    assert took <= limits.seconds + 1
    assert canary.read_text() == "untouched" and not outside.exists()
    assert not _programs_alive()


def _programs_alive() -> list[str]:
    """Command lines of programs of this process that still run (others' tests may have theirs)."""
    deadline = time.monotonic() + 1
    while found := [c for c in _children(os.getpid()) if "program.py" in c]:
        if time.monotonic() > deadline:
            return found
        time.sleep(0.02)
    return []


def _children(pid: int) -> list[str]:
    """Command lines of the descendants of a process, and of orphans of its sandbox."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if stat[0] != "Z":
                parents[int(entry.name)] = (int(stat[1]), command)

    def below(child: int) -> bool:
        while child in parents:
            if child == pid:
                return True
            child = parents[child][0]
        return False

    return [command for child, (_, command) in parents.items() if child != pid and below(child)]


@needs_bubblewrap
def test_a_fork_bomb_does_not_starve_its_neighbours() -> None:
    """The limit on processes holds for one program, not for all that run at the time."""
    bomb = GOOD + HOSTILE["fork bomb"]
    forks = (
        GOOD + "import os\nfor _ in range(5):\n    pid = os.fork()\n    if not pid: os._exit(0)\n    os.waitpid(pid, 0)"
    )
    boxes = [Sandbox(Limits(seconds=4)), Sandbox(Limits(seconds=60))]  # what is limited is processes, not the time
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda box, code: grade_code(box, code, TESTS)[0], boxes, [bomb, forks]))
    assert found == [False, True]


def test_without_bubblewrap_code_is_refused_unless_a_flag_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "isolation", lambda: "none")
    with pytest.raises(ConfigError, match="unsafe_no_sandbox = true"):
        Sandbox()
    box = Sandbox(Limits(seconds=20), unsafe=True)
    assert grade_code(box, GOOD, TESTS) == (True, "passed")
    assert grade_code(Sandbox(Limits(seconds=1), unsafe=True), GOOD + "while True: pass", TESTS) == (False, "timeout")


@pytest.mark.parametrize("tests", [{"code": 3}, 7, {"code": "def check(:"}, {"code": "", "entry_point": 1}])
def test_bad_tests_are_named(tests: Any) -> None:
    with pytest.raises(DataError, match="tests"):
        grade_code(Sandbox(unsafe=True), GOOD, tests)
