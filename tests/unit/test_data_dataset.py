"""Reading a data set back bit for bit, from many record batches, and refusing a damaged one."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megafuse.data.dataset import GroupDataset, _map_saved, _view
from megafuse.data.store import (
    FORMAT,
    Row,
    RowWriter,
    atomic_folder,
    content_digest,
    file_sizes,
    save_sorted,
)
from megafuse.errors import DataError, IntegrityError


def random_rows(n: int) -> list[Row]:
    rng = np.random.default_rng()

    def ids(longest: int) -> np.ndarray:
        return rng.integers(0, 50, rng.integers(1, longest)).astype(np.int32)

    rows = []
    for i in range(n):
        count = int(rng.integers(1, 6))
        terms = tuple(tuple(map(int, rng.integers(0, count, rng.integers(1, 4)))) for _ in range(rng.integers(1, 4)))
        weights = rng.dirichlet(np.ones(len(terms)))
        rewards = rng.normal(size=count) * 10.0 ** rng.integers(-300, 300)
        answers = tuple(ids(20) for _ in range(count))
        rows.append(Row(f"p{i:05}\u00e9", "math", ids(9), answers, tuple("abcde"[:count]), rewards, terms, weights))
    return rows


def write(path: Path, rows: list[Row], kind: str = "rloo") -> dict[str, Any]:
    order = np.random.default_rng().permutation(len(rows))
    with atomic_folder(path, overwrite=True) as work:
        writer = RowWriter(work / "stream")
        for i in order:
            writer.append(rows[i])
        writer.close()
        save_sorted(work / "stream", np.argsort(order).tolist(), work / "groups")
        (work / "stream").unlink()
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "groups": len(rows),
            "responses": sum(len(r.responses) for r in rows),
            "tokens": sum(r.tokens for r in rows),
            "vocab_size": 50,
            "digest": {"data": content_digest(kind, [r.digest() for r in rows])},
            "files": file_sizes(work, "groups"),
        }
        (work / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return random_rows(2500)  # several record batches of datasets' 1000 rows


@pytest.fixture
def path(tmp_path: Path, rows: list[Row]) -> Path:
    write(tmp_path / "ds", rows)
    return tmp_path / "ds"


def test_reads_back_bit_for_bit(path: Path, rows: list[Row]) -> None:
    ds = GroupDataset(path)
    assert len(ds) == len(rows) and len(ds._batches) > 1
    for i, row in enumerate(rows):
        group = ds[i]
        assert (group.index, group.prompt_id, group.sources) == (i, row.prompt_id, row.sources)
        assert group.prompt.dtype == group.members.dtype == np.int32 and not group.prompt.flags.writeable
        np.testing.assert_array_equal(group.prompt, row.prompt)
        assert group.rewards.tobytes() == row.rewards.tobytes() and group.weights.tobytes() == row.weights.tobytes()
        assert [tuple(t[t >= 0]) for t in group.members] == list(row.members)
        assert len(group.responses) == len(row.responses)
        for got, want in zip(group.responses, row.responses):
            np.testing.assert_array_equal(got, want)
    assert ds[-1].prompt_id == rows[-1].prompt_id and ds.domains == ["math"] * len(rows)
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            ds[outside]


def test_lengths(path: Path, rows: list[Row]) -> None:
    ds = GroupDataset(path)
    flat, offsets = ds.response_lengths
    assert flat.dtype == offsets.dtype == ds.prompt_lengths.dtype == np.int64
    assert ds.prompt_lengths.tolist() == [len(r.prompt) for r in rows]
    assert flat.tolist() == [len(a) for r in rows for a in r.responses]
    assert np.diff(offsets).tolist() == [len(r.responses) for r in rows] and offsets[0] == 0
    assert ds.group_lengths.tolist() == [r.tokens for r in rows]
    np.testing.assert_array_equal(ds.response_offsets, offsets)


def test_pickles_as_a_path(path: Path) -> None:
    data = pickle.dumps(GroupDataset(path))
    assert len(data) < 500 and pickle.loads(data)[7].prompt_id == GroupDataset(path)[7].prompt_id


def test_a_group_without_terms(tmp_path: Path) -> None:
    row = Row("p", "d", np.array([1], np.int32), (np.array([2], np.int32),), ("a",), np.ones(1), (), np.zeros(0))
    write(tmp_path / "ds", [row], kind="rank")
    ds = GroupDataset(tmp_path / "ds")
    ds.verify()
    assert ds[0].members.shape == (0, 1) and ds[0].weights.shape == (0,)


def test_verify_finds_one_changed_number(tmp_path: Path) -> None:
    rows = random_rows(30)
    write(tmp_path / "ds", rows)
    GroupDataset(tmp_path / "ds").verify()
    file = tmp_path / "ds" / "groups" / "data-00000-of-00001.arrow"
    data = bytearray(file.read_bytes())
    at = data.find(np.array(rows[7].rewards[:1]).tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="digest"):
        GroupDataset(tmp_path / "ds").verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": ((0, 9),)}, "term over response 9"),
        ({"weights": np.array([0.5])}, "weights that sum to"),
        ({"prompt": np.array([50], np.int32)}, "outside"),
        ({"prompt": np.array([-1], np.int32)}, "outside"),
        ({"rewards": np.ones(3)}, "different lengths"),
    ],
)
def test_verify_finds_what_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {
        "prompt": np.array([1], np.int32),
        "responses": (np.array([2], np.int32), np.array([3], np.int32)),
        "sources": ("a", "a"),
        "rewards": np.ones(2),
        "members": ((0, 1),),
        "weights": np.ones(1),
    }
    write(tmp_path / "ds", [Row("p", "d", **{**good, **change})], kind="pair")  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match=rf"group 0 \('p'\) has .*{message}"):
        GroupDataset(tmp_path / "ds").verify()


def edit(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "megafuse-dataset/9"}, "format 'megafuse-dataset/9'"),
        ({"kind": "magic"}, "kind 'magic'"),
        ({"tokens": None}, "lacks 'tokens'"),
        ({"groups": 7}, "holds 2500 groups, the manifest says 7"),
        ({"tokens": 7}, "tokens, the manifest says 7"),
        ({"files": {"../secret": 1}}, "outside the folder"),
        ({"files": {"groups/lost": 1}}, "groups/lost is missing"),
    ],
)
def test_wrong_manifest(path: Path, changes: dict[str, Any], message: str) -> None:
    edit(path, **changes)
    with pytest.raises(IntegrityError, match=message):
        GroupDataset(path)


def test_damaged_files(path: Path) -> None:
    file = path / "groups" / "data-00000-of-00001.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(IntegrityError, match=rf"has {len(data) - 1000} bytes, the manifest says {len(data)}"):
        GroupDataset(path)
    edit(path, files={})
    file.write_bytes(b"\0" * len(data))
    with pytest.raises(IntegrityError, match="groups/ is not readable"):
        GroupDataset(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError, match="not JSON"):
        GroupDataset(path)
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not a data set"):
        GroupDataset(path)


def test_is_mapped_as_datasets_maps_it_without_its_imports(path: Path) -> None:
    """Every rank opens its data set at its start, and pandas alone takes a second of it."""
    import datasets

    assert _map_saved(path / "groups").equals(datasets.load_from_disk(str(path / "groups")).data.table)
    look = (
        "import sys; from megafuse.data.dataset import GroupDataset; groups = GroupDataset(sys.argv[1]); groups[7]; "
        "groups.response_lengths; print(sorted({'datasets', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", look, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("numbers", [pa.array([1, 2, 3], pa.int32())[1:], pa.array([], pa.int32()), pa.array([0.5])])
def test_a_view_is_what_to_numpy_gives(numbers: pa.Array) -> None:
    seen, exact = _view(numbers), numbers.to_numpy()
    assert seen.dtype == exact.dtype and seen.tolist() == exact.tolist() and not seen.flags.writeable
    with pytest.raises(pa.ArrowInvalid, match="1 of 2 values are null"):
        _view(pa.array([1, None], numbers.type))
