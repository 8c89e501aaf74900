"""Does the code of a response work? Static analysis, then its test cases in a sandbox (FuseChat-3.0's two steps).

A pass must be earned by coming to the end of the tests: the program gets a secret line on standard input, keeps it,
and writes it after the last test. Leaving early with exit status 0 is a failure. A response that looks for the secret
in its own process can find it; nothing that runs in one process with its tests can prevent that.
"""

import ast
import re
import secrets
from typing import Any

from megafuse.errors import DataError
from megafuse.rewards.sandbox import Sandbox

_FENCE = re.compile(r"```[ \t]*([A-Za-z0-9+#]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("python", "py", "python3", "")

_HARNESS = """\
def _run(code, tests, entry):
    import os, sys
    token = sys.stdin.readline()
    space = {{"__name__": "response"}}
    exec(compile(code, "response", "exec"), space)
    exec(compile(tests, "tests", "exec"), space)
    if entry:
        space["check"](eval(entry, space))
    sys.stdout.flush()
    os.write(1, b"\\n" + token.encode())
_run({code!r}, {tests!r}, {entry!r})
"""


def extract_code(text: str, entry_point: str | None = None) -> str:
    """The Python of a response: its last fenced block that defines `entry_point`, else its longest, else all of it."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in _PYTHON]
    if not blocks:
        return text
    name = (entry_point or "").split("(")[0].split(".")[0]
    defining = [b for b in blocks if name and re.search(rf"\b(?:def|class)\s+{re.escape(name)}\b", b)]
    return defining[-1] if defining else max(blocks, key=len)


def static_problem(code: str, entry_point: str | None) -> str:
    """Why code cannot work, without running it: `syntax` or `no_entry_point`; "" where nothing speaks against it."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "syntax"
    name = (entry_point or "").split("(")[0].split(".")[0]
    if not name:
        return ""
    bound = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.alias)
    }
    bound |= {node.asname for node in ast.walk(tree) if isinstance(node, ast.alias) and node.asname}
    bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return "" if name in bound else "no_entry_point"


def read_tests(tests: Any) -> tuple[str, str | None]:
    """(code, entry point) of a prompt's `tests`: `{code, entry_point?}`, or code alone.

    Raises:
        DataError: it is something else, or does not parse.
    """
    code, entry = (tests.get("code"), tests.get("entry_point")) if isinstance(tests, dict) else (tests, None)
    if not isinstance(code, str) or not (entry is None or isinstance(entry, str)):
        raise DataError(f"tests must be {{code, entry_point?}} or a text, got {tests!r:.80}")
    try:
        ast.parse(code)
    except (SyntaxError, ValueError) as e:
        raise DataError(f"tests do not parse as Python: {e}") from None
    return code, entry


def grade_code(sandbox: Sandbox, text: str, tests: Any) -> tuple[bool, str]:
    """(passed, verdict) of a response; verdicts: passed, syntax, no_entry_point, failed, timeout, output, killed."""
    test_code, entry = read_tests(tests)
    code = extract_code(text, entry)
    if problem := static_problem(code, entry):
        return False, problem
    token = secrets.token_hex(16)
    program = _HARNESS.format(code=code, tests=test_code, entry=entry)
    ended = sandbox.run(program, f"{token}\n".encode())
    if ended.end == "exit" and ended.code == 0 and ended.output.endswith(f"\n{token}\n".encode()):
        return True, "passed"
    return False, {"exit": "failed", "signal": "killed"}.get(ended.end, ended.end)
