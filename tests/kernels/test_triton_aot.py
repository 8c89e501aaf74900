"""Every Triton kernel compiled for sm_90 on a machine without a GPU: it fits, nothing spills, Hopper units are used."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 232_448  # bytes a block may have on sm_90


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Facts by build. A process of its own: in this one Triton may be an interpreter, which compiles nothing."""
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("t")),
    }
    command = [sys.executable, "-W", "ignore", "-m", "megafuse.testing.kernel_aot"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_is_compiled(built: dict[str, dict[str, Any]]) -> None:
    kernels = set()
    for path in (ROOT / "kernels").glob("_triton_*.py"):
        public = re.findall(r"^@triton\.jit(?:\([^)]*\))?\ndef ([a-z]\w*)\(", path.read_text(), re.MULTILINE)
        kernels |= set(public if path.name != "_triton_math.py" else ())
    assert len(kernels) > 12
    assert kernels == {name.split("-")[0] for name in built}


def test_nothing_spills_and_everything_fits(built: dict[str, dict[str, Any]]) -> None:
    for name, facts in built.items():
        assert facts["stack"] == 0 and "STL" not in facts and "LDL" not in facts, (name, facts)
        assert facts["shared"] <= SHARED_MEMORY and facts["registers"] <= 255, (name, facts)


def test_the_large_product_uses_hopper(built: dict[str, dict[str, Any]]) -> None:
    """Warp-group matrix instructions and TMA loads; exactly one exponential an element (two with the soft cap)."""
    for name, facts in built.items():
        if not name.startswith("exp_product") or name == "exp_product-fp32":
            continue
        assert facts["HGMMA"] > 0, (name, facts)
        assert "pointers" in name or facts["UTMALDG"] > 0, (name, facts)
    for name, per_element in (("keep", 1), ("keep-cap", 2), ("forward", 1)):
        assert built[f"exp_product-{name}"]["MUFU.EX2"] == per_element * 128 * 256 // 256  # elements of a thread
    assert built["exp_product-keep"]["UTMASTG"] == 2 and "UTMASTG" not in built["exp_product-forward"]


def test_the_logits_are_read_in_wide_words(built: dict[str, dict[str, Any]]) -> None:
    for name, facts in built.items():
        if name.startswith(("row_stats", "row_gradient")):
            assert facts["LDG.E.128"] >= 2, (name, facts)
        if name.startswith("row_gradient"):
            assert facts["STG.E.128"] >= 2, (name, facts)


def test_heads_are_read_and_written_in_wide_words(built: dict[str, dict[str, Any]]) -> None:
    for name, facts in built.items():
        if name.startswith("turn_heads"):
            assert facts["LDG.E.128"] >= 2 and facts["STG.E.128"] >= 2, (name, facts)


def test_no_floating_point_atomics(built: dict[str, dict[str, Any]]) -> None:
    """Only the flag of rows to do again is atomic: a maximum of integers."""
    atomic = {name.split("-")[0] for name, facts in built.items() if "ATOM" in facts or "RED" in facts}
    assert atomic <= {"sum_tiles"}
