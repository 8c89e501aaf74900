"""Memory-mapped access to a built data set: any group by its index, and all lengths without touching a token."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megafuse.data.store import FORMAT, GROUPS, MANIFEST, SCHEMA, Row, content_digest
from megafuse.data.types import KINDS, Group
from megafuse.errors import DataError, IntegrityError


def _view(numbers: pa.Array) -> np.ndarray:
    """`numbers.to_numpy()`, without the pandas that pyarrow imports for it: read-only, not copied.

    Raises ArrowInvalid where a value is null.
    """
    if numbers.null_count:
        raise pa.ArrowInvalid(f"{numbers.null_count} of {len(numbers)} values are null")
    dtype, buffer = np.dtype(numbers.type.to_pandas_dtype()), numbers.buffers()[1]
    if buffer is None:  # an empty array may have none
        return np.empty(0, dtype)
    view = np.frombuffer(buffer, dtype, len(numbers), numbers.offset * dtype.itemsize)
    view.flags.writeable = False
    return view


class _Lists:
    """A `list<T>` column of one record batch as NumPy views of the mapped file: `[i] -> view of row i`."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = _view(column.offsets)  # [rows + 1] int32, relative to `child`
        self.child = column.values

    @cached_property
    def inner(self) -> "_Lists":
        """The inner lists of a `list<list<T>>` column."""
        return _Lists(self.child)

    @cached_property
    def values(self) -> np.ndarray:
        """All values of a `list<number>` column, read-only."""
        return _view(self.child)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def nested(self, i: int) -> list[np.ndarray]:
        """The inner lists of row i of a `list<list<number>>` column."""
        return [self.inner[j] for j in range(self.offsets[i], self.offsets[i + 1])]


class _Batch:
    def __init__(self, batch: pa.RecordBatch) -> None:
        self.prompt_id, self.domain = batch.column("prompt_id"), batch.column("domain")
        self.prompt, self.response = _Lists(batch.column("prompt_tokens")), _Lists(batch.column("response_tokens"))
        self.source, self.reward = batch.column("source"), _Lists(batch.column("reward"))
        self.members, self.weight = _Lists(batch.column("term_members")), _Lists(batch.column("term_weight"))


def _map_saved(folder: Path) -> pa.Table:
    """What `datasets.Dataset.save_to_disk` wrote, mapped: as `datasets.load_from_disk`, without importing pandas.

    That import would be a second of every rank's start. Raises what json and pyarrow raise.
    """
    files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    parts = [pa.ipc.open_stream(pa.memory_map(str(folder / Path(f["filename"]).name))).read_all() for f in files]
    return pa.concat_tables(parts)


class GroupDataset:
    """A data set written by `megafuse build`; `ds[i]` is a `Group` whose arrays are read-only views of the file.

    Opening maps the file and compares the sizes of its files and its counts with the manifest; `verify()` recomputes
    the content digest. Safe to pickle: a worker process maps the file itself.

    Raises:
        DataError: `path` holds no data set.
        IntegrityError: the data set is damaged or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = self._read_manifest()
        self.kind: str = self.manifest["kind"]
        table = self._map()
        self._batches = [_Batch(b) for b in table.to_batches() if b.num_rows]
        rows = [b.num_rows for b in table.to_batches() if b.num_rows]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._check_counts()

    def _fail(self, what: str) -> IntegrityError:
        return IntegrityError(f"data set {self.path}: {what}. Build it again with `megafuse build`")

    def _read_manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except OSError as e:
            raise DataError(f"{self.path} is not a data set: {MANIFEST}: {e.strerror}") from None
        except ValueError as e:
            raise self._fail(f"{MANIFEST} is not JSON: {e}") from None
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise self._fail(f"{MANIFEST} has format {found!r}, this version reads {FORMAT!r}")
        needed = {"kind": str, "groups": int, "responses": int, "tokens": int, "vocab_size": int, "digest": dict}
        for key, kind in needed.items():
            if not isinstance(manifest.get(key), kind):
                raise self._fail(f"{MANIFEST} lacks {key!r} ({kind.__name__})")
        if manifest["kind"] not in KINDS:
            raise self._fail(f"{MANIFEST} has kind {manifest['kind']!r}, known are {', '.join(KINDS)}")
        return manifest

    def _map(self) -> pa.Table:
        for name, size in self.manifest.get("files", {}).items():
            file = self.path / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise self._fail(f"{MANIFEST} names a file outside the folder: {name}")
            actual = file.stat().st_size if file.is_file() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual} bytes"
                raise self._fail(f"{name} {state}, the manifest says {size} bytes")
        try:
            table = _map_saved(self.path / GROUPS)
        except Exception as e:  # pyarrow and json have their own
            raise self._fail(f"{GROUPS}/ is not readable: {type(e).__name__}: {e}") from e
        for want in SCHEMA:
            if want.name not in table.column_names or table.schema.field(want.name).type != want.type:
                raise self._fail(f"{GROUPS}/ has no column {want.name!r} of type {want.type}")
        return table

    def _check_counts(self) -> None:
        flat, _ = self.response_lengths
        found = {
            "groups": len(self),
            "responses": len(flat),
            "tokens": int(self.prompt_lengths.sum() + flat.sum()),
        }
        for key, value in found.items():
            if self.manifest[key] != value:
                raise self._fail(f"{GROUPS}/ holds {value} {key}, the manifest says {self.manifest[key]}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type["GroupDataset"], tuple[str]]:
        return GroupDataset, (str(self.path),)

    def _locate(self, index: int) -> tuple[_Batch, int]:
        b = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[b], index - int(self._starts[b])

    def __getitem__(self, index: int) -> Group:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"group {index} of {n}")
        index = int(index) % n
        batch, i = self._locate(index)
        terms = batch.members.nested(i)
        members = np.full((len(terms), max(map(len, terms), default=1)), -1, dtype=np.int32)
        for row, term in zip(members, terms):
            row[: len(term)] = term
        return Group(
            index=index,
            prompt_id=batch.prompt_id[i].as_py(),
            prompt=batch.prompt[i],
            responses=tuple(batch.response.nested(i)),
            sources=tuple(batch.source[i].as_py()),
            rewards=batch.reward[i],
            members=members,
            weights=batch.weight[i],
        )

    def __iter__(self) -> Iterator[Group]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt. [N] int64."""
        return _concatenate([np.diff(b.prompt.offsets) for b in self._batches])

    @cached_property
    def response_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of each response [R] int64, offsets [N + 1] int64): group i has `flat[offsets[i]:offsets[i + 1]]`."""
        flat, counts = [], []
        for b in self._batches:
            outer = b.response.offsets
            flat.append(np.diff(b.response.inner.offsets[outer[0] : outer[-1] + 1]))
            counts.append(np.diff(outer))
        return _concatenate(flat), np.concatenate([[0], np.cumsum(_concatenate(counts))]).astype(np.int64)

    @cached_property
    def term_members(self) -> tuple[np.ndarray, np.ndarray]:
        """(members of all terms [E] int64 as positions over all responses, offsets [M + 1] int64 of each term)."""
        flat, sizes = [], []
        start = np.split(self.response_offsets[:-1], self._starts[1:-1])
        for b, first in zip(self._batches, start):
            outer = b.members.offsets
            inner = b.members.inner.offsets[outer[0] : outer[-1] + 1]
            of_term = np.repeat(first, np.diff(outer))
            flat.append(b.members.inner.values[inner[0] : inner[-1]] + np.repeat(of_term, np.diff(inner)))
            sizes.append(np.diff(inner))
        return _concatenate(flat), np.concatenate([[0], np.cumsum(_concatenate(sizes))]).astype(np.int64)

    @property
    def response_offsets(self) -> np.ndarray:
        """Where the responses of each group start in a flat array over all responses. [N + 1] int64."""
        return self.response_lengths[1]

    @cached_property
    def group_lengths(self) -> np.ndarray:
        """Tokens of each group with its prompt counted once. [N] int64."""
        flat, offsets = self.response_lengths
        sums = np.concatenate([[0], np.cumsum(flat)])
        return self.prompt_lengths + sums[offsets[1:]] - sums[offsets[:-1]]

    @cached_property
    def prompt_ids(self) -> list[str]:
        """The prompt id of each group."""
        return [x for b in self._batches for x in b.prompt_id.to_pylist()]

    @cached_property
    def domains(self) -> list[str]:
        """The domain of each group."""
        return [x for b in self._batches for x in b.domain.to_pylist()]

    def verify(self) -> None:
        """Read everything: indices, weights, token ids, and the content digest of the manifest.

        Raises:
            IntegrityError: naming the first group that is wrong, or the two digests.
        """
        digests = []
        for group, domain in zip(self, self.domains):
            self._verify_group(group)
            members = tuple(tuple(int(j) for j in term if j >= 0) for term in group.members)
            row = Row(
                group.prompt_id,
                domain,
                group.prompt,
                group.responses,
                group.sources,
                group.rewards,
                members,
                group.weights,
            )
            digests.append(row.digest())
        found, wanted = content_digest(self.kind, digests), self.manifest["digest"].get("data")
        if found != wanted:
            raise self._fail(f"the content has digest {found}, the manifest says {wanted}")

    def _verify_group(self, group: Group) -> None:
        n, name = len(group.responses), f"group {group.index} ({group.prompt_id!r})"
        if not len(group.sources) == len(group.rewards) == n or len(group.members) != len(group.weights):
            raise self._fail(f"{name} has columns of different lengths")
        if group.members.size and (group.members.max() >= n or group.members.min() < -1):
            raise self._fail(f"{name} has a term over response {group.members.max()} of {n}")
        if self.kind != "rank" and not abs(group.weights.sum() - 1) < 1e-9:
            raise self._fail(f"{name} has weights that sum to {group.weights.sum()!r}")
        for ids in (group.prompt, *group.responses):
            if not len(ids) or ids.min() < 0 or ids.max() >= self.manifest["vocab_size"]:
                raise self._fail(f"{name} has an empty sequence or a token outside [0, {self.manifest['vocab_size']})")


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
