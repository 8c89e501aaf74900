"""Reference log-probs on disk: parts in data set order, written once, resumable, read at any layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megafuse.data.parts import response_places
from megafuse.data.types import Part
from megafuse.errors import IntegrityError, NonFiniteError
from megafuse.observe.manifest import atomic_file, read_manifest_of, utc_now, versions, write_json_atomic
from megafuse.reference.digest import ARCHITECTURE, require_match, settings_precision

FORMAT = "megafuse-reference/1"


@dataclass(frozen=True)
class ReferenceLogps:
    """Sum of log-probs of every response of a data set under one named reference."""

    name: str
    logps: np.ndarray  # [R] float64, responses of all groups in data set order
    lengths: np.ndarray  # [R] int64
    offsets: np.ndarray  # [N + 1] int64: responses of group i are offsets[i]:offsets[i + 1]

    def of_parts(self, parts: tuple[Part, ...]) -> np.ndarray:
        """Log-probs of the responses of `parts`, one behind the other. [n] float64."""
        return self.logps[response_places(self.offsets, parts)]


class CacheWriter:
    """Writes a cache part by part; a part is `part_groups` consecutive groups. One process writes.

    Opening a folder that was begun before goes on where it stopped, if it has the same key.
    """

    def __init__(
        self, folder: Path, name: str, digest: dict[str, str], offsets: np.ndarray, part_groups: int, source: str
    ) -> None:
        """Raises IntegrityError when the folder holds a cache with another key."""
        self.folder, self.offsets = folder, offsets
        groups = len(offsets) - 1
        self.manifest: dict[str, Any] = {
            "format": FORMAT, "name": name, "model": source, "created": utc_now(), "digest": digest, "groups": groups,
            "responses": int(offsets[-1]), "part_groups": part_groups, "parts": -(-groups // part_groups),
            "complete": False, "versions": versions(),
        }  # fmt: skip
        if found := _manifest(folder):
            require_match(digest, found["digest"], folder)
            self.manifest = found
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / "manifest.json", self.manifest)

    def missing(self) -> list[tuple[int, int, int]]:
        """Parts that are not on disk yet: (part, first group, one past the last group)."""
        size, groups = self.manifest["part_groups"], self.manifest["groups"]
        spans = [(i, i * size, min((i + 1) * size, groups)) for i in range(self.manifest["parts"])]
        return [span for span in spans if not self._part(span[0]).is_file()]

    def write(self, part: int, logps: np.ndarray, lengths: np.ndarray) -> None:
        """Store the responses of one part: [r] float64 and [r] int64. Whole or not at all.

        Raises:
            NonFiniteError: a log-prob is NaN or infinite; nothing of this part is stored.
        """
        if bad := int((~np.isfinite(logps)).sum()):
            first = part * self.manifest["part_groups"]
            raise NonFiniteError(
                f"{bad} of {len(logps)} log-probs of the groups from {first} on are NaN or infinite, and not stored in "
                f"{self.folder}: the model overflows; set model.precision = 'fp32', or restore its weights"
            )
        with atomic_file(self._part(part)) as file:
            np.savez(file, logps=logps.astype(np.float64), lengths=lengths.astype(np.int64))

    def finish(self) -> None:
        """Mark the cache complete."""
        write_json_atomic(self.folder / "manifest.json", {**self.manifest, "complete": True})

    def _part(self, index: int) -> Path:
        return self.folder / part_name(index, self.manifest["parts"])


def part_name(index: int, parts: int) -> str:
    """File name of one part."""
    return f"part-{index:05d}-of-{parts:05d}.npz"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished cache."""
    found = _manifest(folder)
    return found is not None and bool(found["complete"])


def began_precision(folder: Path) -> str | None:
    """The precision of the cache, finished or not, in `folder`; None where there is no readable one."""
    found = _manifest(folder)
    return None if found is None else settings_precision(found["digest"].get("settings", ""))


def has_architecture(folder: Path) -> bool:
    """Whether `folder` holds a finished cache whose key says under which architecture it was computed."""
    return is_complete(folder) and ARCHITECTURE in read_manifest_of(folder, FORMAT)["digest"]


def require_key(folder: Path, expected: dict[str, str], *, advice: str) -> None:
    """Refuse to go on with a cache in `folder`, if there is one, that belongs to something else.

    Raises:
        IntegrityError: naming the part that differs, and `advice`.
    """
    if found := _manifest(folder):
        require_match(expected, found["digest"], folder, advice=advice)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the cache, finished or not, in `folder`, if there is one."""
    return read_manifest_of(folder, FORMAT) if (folder / "manifest.json").is_file() else None


def read_cache(folder: Path, expected: dict[str, str], offsets: np.ndarray, lengths: np.ndarray) -> ReferenceLogps:
    """Read a finished cache.

    expected: the key that this run needs; offsets [N + 1], lengths [R]: the responses of the data set.

    Raises:
        IntegrityError: the cache is unfinished, damaged, or belongs to something else (naming the part that differs).
    """
    manifest = read_manifest_of(folder, FORMAT)
    require_match(expected, manifest["digest"], folder)
    if not manifest["complete"]:
        raise IntegrityError(f"reference cache {folder} is unfinished; run `megafuse reference` on it again")
    logps, found = [], []
    for index in range(manifest["parts"]):
        path = folder / part_name(index, manifest["parts"])
        try:
            with np.load(path) as part:
                logps.append(part["logps"])
                found.append(part["lengths"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise IntegrityError(f"{path} cannot be read ({error}); delete it and run `megafuse reference`") from error
    values = np.concatenate([np.zeros(0), *logps])
    counted = np.concatenate([np.zeros(0, np.int64), *found])
    if not np.array_equal(counted, lengths):
        raise IntegrityError(f"reference cache {folder} counts other response lengths than the data set")
    if not np.isfinite(values).all():
        raise IntegrityError(f"reference cache {folder} holds {int((~np.isfinite(values)).sum())} non-finite log-probs")
    return ReferenceLogps(manifest["name"], values, counted, offsets)
