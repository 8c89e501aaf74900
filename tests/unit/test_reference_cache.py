"""The reference cache: order, resuming, and a refusal that names the part that differs."""

import json
from pathlib import Path

import numpy as np
import pytest

from megafuse.data.types import Part
from megafuse.errors import IntegrityError, NonFiniteError
from megafuse.reference.cache import CacheWriter, is_complete, part_name, read_cache
from megafuse.reference.digest import PARTS

DIGEST = {part: f"{part}-1" for part in PARTS}
OFFSETS = np.array([0, 2, 5, 6, 10, 11])
LENGTHS = np.arange(11, dtype=np.int64) + 1


def write(folder: Path, values: np.ndarray, *, only: tuple[int, ...] = (0, 1, 2)) -> CacheWriter:
    writer = CacheWriter(folder, "ref", DIGEST, OFFSETS, 2, "model")
    for part, first, stop in writer.missing():
        if part in only:
            span = slice(OFFSETS[first], OFFSETS[stop])
            writer.write(part, values[span], LENGTHS[span])
    return writer


def test_parts_come_back_in_data_set_order(tmp_path: Path) -> None:
    values = np.random.default_rng().normal(-50, 20, 11)
    write(tmp_path / "ref", values).finish()
    cache = read_cache(tmp_path / "ref", DIGEST, OFFSETS, LENGTHS)
    assert np.array_equal(cache.logps, values)
    parts = (Part(3, (0, 1, 2, 3)), Part(0, (0, 1)), Part(1, (0, 2)), Part(1, (1,)))
    assert np.array_equal(cache.of_parts(parts), values[[6, 7, 8, 9, 0, 1, 2, 4, 3]])
    assert cache.of_parts(()).shape == (0,)


def test_a_killed_write_is_finished_where_it_stopped(tmp_path: Path) -> None:
    values = np.arange(11.0)
    write(tmp_path / "ref", values, only=(1,))
    assert not is_complete(tmp_path / "ref")
    with pytest.raises(IntegrityError, match="unfinished"):
        read_cache(tmp_path / "ref", DIGEST, OFFSETS, LENGTHS)
    again = CacheWriter(tmp_path / "ref", "ref", DIGEST, OFFSETS, 2, "model")
    assert again.missing() == [(0, 0, 2), (2, 4, 5)]
    write(tmp_path / "ref", values).finish()
    assert np.array_equal(read_cache(tmp_path / "ref", DIGEST, OFFSETS, LENGTHS).logps, values)


@pytest.mark.parametrize("part", PARTS)
def test_a_mismatch_names_its_part_and_no_other(tmp_path: Path, part: str) -> None:
    write(tmp_path / "ref", np.zeros(11)).finish()
    other = {**DIGEST, part: "something else"}
    for attempt in (
        lambda: read_cache(tmp_path / "ref", other, OFFSETS, LENGTHS),
        lambda: CacheWriter(tmp_path / "ref", "ref", other, OFFSETS, 2, "model"),
    ):
        with pytest.raises(IntegrityError) as error:
            attempt()
        named = [p for p in PARTS if f"  {p}: " in str(error.value)]
        assert named == [part] and "something else" in str(error.value)


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "ref", np.zeros(11)).finish()
    victim = tmp_path / "ref" / part_name(1, 3)
    victim.write_bytes(victim.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=victim.name):
        read_cache(tmp_path / "ref", DIGEST, OFFSETS, LENGTHS)
    write(tmp_path / "nan", np.zeros(11)).finish()
    np.savez(
        tmp_path / "nan" / part_name(1, 3), logps=np.full(5, np.nan), lengths=LENGTHS[5:10]
    )  # as it was once stored
    with pytest.raises(IntegrityError, match="5 non-finite"):
        read_cache(tmp_path / "nan", DIGEST, OFFSETS, LENGTHS)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_log_prob_that_is_not_finite_is_not_stored(tmp_path: Path, value: float) -> None:
    values = np.zeros(11)
    values[6] = value  # of group 3, in the second part
    with pytest.raises(NonFiniteError, match=r"1 of 5 log-probs of the groups from 2 on are NaN or infinite"):
        write(tmp_path / "ref", values)
    assert not is_complete(tmp_path / "ref")
    write(tmp_path / "ref", np.zeros(11)).finish()  # nothing bad is in the way
    assert np.array_equal(read_cache(tmp_path / "ref", DIGEST, OFFSETS, LENGTHS).logps, np.zeros(11))


def test_a_cache_of_before_its_key_had_the_architecture_is_read(tmp_path: Path) -> None:
    write(tmp_path / "ref", np.zeros(11), only=(1,))
    manifest = json.loads((tmp_path / "ref" / "manifest.json").read_text())
    del manifest["digest"]["architecture"]
    (tmp_path / "ref" / "manifest.json").write_text(json.dumps(manifest))
    write(tmp_path / "ref", np.zeros(11)).finish()
    assert read_cache(tmp_path / "ref", DIGEST, OFFSETS, LENGTHS).logps.shape == (11,)
    with pytest.raises(IntegrityError, match="weights: the reference model's weights"):
        read_cache(tmp_path / "ref", {**DIGEST, "weights": "other"}, OFFSETS, LENGTHS)


def test_several_references_stand_side_by_side(tmp_path: Path) -> None:
    for name, value in (("first", 1.0), ("second", 2.0)):
        writer = CacheWriter(tmp_path / name, name, DIGEST, OFFSETS, 5, "model")
        for part, _, _ in writer.missing():
            writer.write(part, np.full(11, value), LENGTHS)
        writer.finish()
    caches = [read_cache(tmp_path / n, DIGEST, OFFSETS, LENGTHS) for n in ("first", "second")]
    assert [(c.name, c.logps[0]) for c in caches] == [("first", 1.0), ("second", 2.0)]
