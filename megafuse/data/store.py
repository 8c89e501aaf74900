"""The data set on disk: its columns, its content digest, and writing it so that it appears whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megafuse.errors import DataError
from megafuse.observe.manifest import sync_path

FORMAT = "megafuse-dataset/1"
MANIFEST = "manifest.json"
GROUPS = "groups"
SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "domain": pa.string(),
        "prompt_tokens": pa.list_(pa.int32()),
        "response_tokens": pa.list_(pa.list_(pa.int32())),
        "source": pa.list_(pa.string()),
        "reward": pa.list_(pa.float64()),
        "term_members": pa.list_(pa.list_(pa.int32())),
        "term_weight": pa.list_(pa.float64()),
    }
)
_ROWS_A_BATCH = 256  # 32-bit offsets hold 2**31 tokens a batch: 8M tokens a row


@dataclass(frozen=True)
class Row:
    """One group as it is stored; see docs/ARCHITECTURE.md for the columns."""

    prompt_id: str
    domain: str
    prompt: np.ndarray  # [P] int32
    responses: tuple[np.ndarray, ...]  # n x [R_i] int32
    sources: tuple[str, ...]  # n
    rewards: np.ndarray  # [n] float64
    members: tuple[tuple[int, ...], ...]  # m terms
    weights: np.ndarray  # [m] float64

    @property
    def tokens(self) -> int:
        """Prompt once and every response: the length of the group's row with prefix sharing."""
        return len(self.prompt) + sum(map(len, self.responses))

    def digest(self) -> bytes:
        """SHA-256 of the content: everything with its length before it, integers little-endian, floats bit for bit."""
        h = hashlib.sha256()
        for text in (self.prompt_id, self.domain, *self.sources):
            data = text.encode()
            h.update(struct.pack("<q", len(data)) + data)
        for ids in (self.prompt, *self.responses, *(np.array(m) for m in self.members)):
            h.update(struct.pack("<q", len(ids)) + np.ascontiguousarray(ids, dtype="<i4").tobytes())
        for values in (self.rewards, self.weights):
            h.update(struct.pack("<q", len(values)) + np.ascontiguousarray(values, dtype="<f8").tobytes())
        return h.digest()


def content_digest(kind: str, row_digests: Sequence[bytes]) -> str:
    """`digest.data` of the manifest: of the kind and of all rows in data set order."""
    h = hashlib.sha256(f"{FORMAT}:{kind}:{len(row_digests)}".encode())
    for digest in row_digests:
        h.update(digest)
    return h.hexdigest()


class RowWriter:
    """Appends rows to one Arrow stream file, a batch at a time, in the order given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[Row] = []
        self._stream = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._stream, SCHEMA)

    def append(self, row: Row) -> None:
        """Add one group."""
        self._pending.append(row)
        if len(self._pending) == _ROWS_A_BATCH:
            self._flush()

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        columns: dict[str, list[Any]] = {
            "prompt_id": [r.prompt_id for r in rows],
            "domain": [r.domain for r in rows],
            "prompt_tokens": [r.prompt for r in rows],
            "response_tokens": [r.responses for r in rows],
            "source": [r.sources for r in rows],
            "reward": [r.rewards for r in rows],
            "term_members": [r.members for r in rows],
            "term_weight": [r.weights for r in rows],
        }
        arrays = [pa.array(columns[f.name], type=f.type) for f in SCHEMA]
        self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))

    def close(self) -> None:
        """Write what is pending and end the stream."""
        if self._pending:
            self._flush()
        self._writer.close()
        self._stream.close()


def save_sorted(stream: Path, order: Sequence[int], groups: Path) -> None:
    """The rows of an Arrow stream file, permuted by `order`, as a Hugging Face `datasets` folder.

    Everything stays memory-mapped. No cache folder and no hub is touched, no progress bar is printed.
    """
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_file(str(stream), in_memory=False)
        rows.select(order, keep_in_memory=True).save_to_disk(str(groups))
    finally:
        if bars:
            datasets.enable_progress_bars()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a data set folder, or None where there is none of ours."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def file_sizes(root: Path, folder: str) -> dict[str, int]:
    """Bytes of each file below `root/folder`, by its path relative to `root`."""
    files = sorted(p for p in (root / folder).rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.stat().st_size for p in files}


@contextlib.contextmanager
def atomic_folder(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place, fully on disk, when the block ends without an error.

    A process that dies leaves at most a `NAME.tmp-*` folder and never half a data set. With `overwrite`, an existing
    data set (and nothing else) is replaced.

    Raises:
        DataError: `final` exists and may not be replaced.
    """
    check_replaceable(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:12]}")
    work.mkdir()
    try:
        yield work
        for path in sorted(work.rglob("*"), reverse=True):  # files before the folders that hold them
            sync_path(path)
        sync_path(work)
        check_replaceable(final, overwrite=overwrite)
        old = None
        if final.exists():
            old = final.with_name(f"{final.name}.tmp-old-{uuid.uuid4().hex[:12]}")
            os.rename(final, old)
        os.rename(work, final)
        sync_path(final.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(final: Path, *, overwrite: bool) -> None:
    """Refuse to touch what exists, unless it is a data set (or an empty folder) and `overwrite` is set.

    Raises:
        DataError: naming the folder and the way out.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if read_manifest(final) is None:
        raise DataError(f"{final} exists and is not a megafuse data set: choose another output folder")
    if not overwrite:
        raise DataError(f"{final} holds a data set that was built differently: set overwrite = true, or another output")
