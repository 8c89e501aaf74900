import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megafuse.errors import IntegrityError
from megafuse.observe.manifest import atomic_file, file_sha256, read_json, utc_now, versions, write_json_atomic


def test_file_sha256_agrees_with_hashlib_over_chunk_borders(tmp_path: Path) -> None:
    for size in (0, 1, 7, 8, 9, 4096):
        content = os.urandom(size)
        (tmp_path / "f").write_bytes(content)
        assert file_sha256(tmp_path / "f", chunk_bytes=8) == hashlib.sha256(content).hexdigest()


def test_versions_and_time() -> None:
    found = versions()
    assert {"python", "megafuse", "torch", "megatron-core", "transformers", "datasets"} <= set(found)
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["torch"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


def test_manifest_imports_nothing_heavy() -> None:
    code = "import sys, megafuse.observe.manifest as m; m.versions(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_json_round_trip_is_exact_and_leaves_no_temporary(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Counts:
        groups: int

    value = float(np.random.default_rng().standard_normal())
    path = tmp_path / "deep" / "manifest.json"
    obj = {"z": value, "a": [np.float64(value), np.int64(3)], "p": Path("x/y"), "c": Counts(2), "u": "\u00fc"}
    write_json_atomic(path, obj)
    expected = {"z": value, "a": [value, 3], "p": "x/y", "c": {"groups": 2}, "u": "\u00fc"}
    assert read_json(path) == expected
    assert list(read_json(path)) == ["z", "a", "p", "c", "u"]
    assert os.listdir(path.parent) == ["manifest.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_refused_value_leaves_the_old_file(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "m.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json_atomic(path, {"x": bad})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["m.json"]


def test_atomic_file_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(IntegrityError, match=r"torn\.json is not valid JSON"):
        read_json(tmp_path / "torn.json")
