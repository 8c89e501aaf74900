"""The way from torch to a built kernel, with a stand-in for the driver of an sm_90: what is built, and how often."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 232_448  # bytes a block may have on sm_90
LENGTHS = (40, 1, 3001, 5003, 8192)  # divisible by 16 or not, one chunk or two that begin anywhere, a single row
# A reference's product does not store E, a step's does; both have a guarded twin, and share the search for the maximum.
# Queries and keys differ in the number of heads.
BUILDS = {"exp_product": 5, "sum_tiles": 2, "turn_heads": 2}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A process of its own: in this one Triton may be an interpreter, which builds nothing."""
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("t")),
    }
    command = [sys.executable, "-W", "ignore", "-m", "megafuse.testing.kernel_jit", *map(str, LENGTHS)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_first_length_builds_everything_and_the_others_nothing(built: dict[str, Any]) -> None:
    kernels = ("target_logits", "exp_product", "sum_tiles", "move_anchors", "finish_targets", "bind_gradient")
    expected = {name: BUILDS.get(name, 1) for name in (*kernels, "fold_rows", "turn_heads")}
    assert built["builds"] == [expected] * len(LENGTHS)


def test_what_is_launched_fits_shared_memory(built: dict[str, Any]) -> None:
    assert max(built["shared"].values()) == built["shared"]["exp_product"] <= SHARED_MEMORY
    assert built["shared"]["exp_product"] > SHARED_MEMORY * 0.9  # the tiles of sm_90, not some others
