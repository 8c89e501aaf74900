"""Size, documentation and hygiene limits of the source, read from the files that git knows or would add."""

import ast
import importlib
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from megafuse.config.base import Config

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
PACKAGE = ("megafuse", "kernels", "launch", "converters")
CODE = {".py", ".cpp", ".hpp", ".cu", ".h", ".sh", ".toml"}
# written apart, so that this file does not find itself
FORBIDDEN = ["TO" + "DO", "FIX" + "ME", "XX" + "X:", "NotImplemented" + "Error"]
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|root|home|Users|mnt)/\w")
REGISTRIES = re.compile("pypi" + r"\.org|python" + r"hosted\.org|registry\.npm" + "js")


@cache
def files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def python_files(*tops: str) -> list[Path]:
    return [p for p in files() if p.suffix == ".py" and (not tops or p.relative_to(ROOT).parts[0] in tops)]


def where(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_there_is_something_to_check() -> None:
    assert len(python_files(*PACKAGE)) > 20


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files() if path.suffix in CODE}
    report([f"{where(p)}: {n} lines, at most {MAX_FILE_LINES}" for p, n in lengths.items() if n > MAX_FILE_LINES])


def test_functions_are_short() -> None:
    problems = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(f"{where(path, node.lineno)}: {node.name} has {lines} lines")
    report(problems)


def test_public_names_of_the_package_have_docstrings() -> None:
    problems = []
    for path in python_files(*PACKAGE):
        if path.name.startswith("_") and path.name != "__init__.py":  # a private module has no public names
            continue
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None and path.read_text().strip():
            problems.append(f"{where(path)}: no module docstring")
        scopes: list[ast.AST] = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
        for scope in scopes:
            for node in getattr(scope, "body", []):
                named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if named and not node.name.startswith("_") and ast.get_docstring(node) is None:
                    problems.append(f"{where(path, node.lineno)}: {node.name} has no docstring")
    report(problems)


def test_every_configuration_field_says_what_it_is() -> None:
    """Field docstrings are the text of `--help`."""
    modules = [p for p in python_files("megafuse") if p.parent.name in ("config", "cli")]
    for path in modules:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    classes, seen = [Config], set()
    while classes:
        for cls in classes.pop().__subclasses__():
            if cls not in seen:
                seen.add(cls)
                classes.append(cls)
    problems = [
        f"{cls.__module__}.{cls.__qualname__}.{name} has no docstring"
        for cls in seen
        if cls.__module__.startswith("megafuse.")
        for name, field in cls.model_fields.items()
        if not field.description and not _is_section(field.annotation)
    ]
    report(problems)


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def test_code_is_ascii() -> None:
    problems = []
    for path in files():
        if path.suffix in CODE:
            lines = path.read_bytes().splitlines()
            problems += [where(path, number) for number, line in enumerate(lines, 1) if not line.isascii()]
    report(problems)


def test_nothing_is_left_undone_and_no_machine_is_named() -> None:
    problems = []
    for path in files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            problems += [f"{where(path, number)}: {word}" for word in FORBIDDEN if word in line]
            for pattern in (MACHINE_PATHS, REGISTRIES):
                if found := pattern.search(line):
                    problems.append(f"{where(path, number)}: {found[0]}")
    report(problems)
