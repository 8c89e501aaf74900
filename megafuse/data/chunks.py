"""A long stage over prompts that can be killed at any moment: one file a chunk of prompts, whole or absent.

    OUT.jsonl.chunks/identity.json    what decides the result; another input or setting is refused once a chunk is done
    OUT.jsonl.chunks/identity.lock    shared by the jobs that make chunks; held alone to change identity.json
    OUT.jsonl.chunks/00003.jsonl      the rows of one chunk, under this name only when they are all on disk
    OUT.jsonl.chunks/00003.lock       held (flock) by the job that makes it; the kernel frees it when that job dies
    OUT.jsonl                         the chunks one after the other, once all are there
    OUT.jsonl.manifest.json

Chunks are the same whoever makes them, and whichever job made the others: the output does not depend on how often the
stage was stopped or on how many jobs shared it.
"""

import contextlib
import fcntl
import gzip
import json
import math
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megafuse.data.jsonpos import column, dotted
from megafuse.data.reader import RecordReader, file_digest, raw_lines
from megafuse.data.records import BadRecord, Form, Rules
from megafuse.errors import DataError
from megafuse.observe.manifest import atomic_file, utc_now, versions, write_json_atomic

Record = dict[str, Any]  # one line of a public file, every key kept


def read_raw(path: Path, form: Form, *, replaced: Collection[str] | None = None) -> list[Record]:
    """Every line of a public file as it is, after all of them have been checked against the form.

    Args:
        path: the file.
        form: what its records must have.
        replaced: keys of the responses that the caller gives new values, where it writes the records again (of form
            `prompts`: with other responses): all other numbers must be finite then. None: it does not write them.

    Raises:
        DataError: bad lines, as `file:line:col: reason`. Responses without text are no error here.
    """
    reader = RecordReader([path], Rules(form=form, drop_bad_responses=True))
    for _ in reader:
        pass
    records = []
    for line, raw in raw_lines(path):
        text = raw.decode("utf-8").removeprefix("\ufeff")
        records.append(json.loads(text))
        if replaced is None:
            continue
        kept = {k: v for k, v in records[-1].items() if form != "prompts" or k != "responses"}
        if found := _nonfinite(kept, replaced):
            where, value = found
            reason = (
                f"{dotted(where)}: must be finite, got {value}: JSON has no such number, and it would be written again"
            )
            reader.bad(BadRecord(str(path), line, column(text, where), reason), raw)
    reader.raise_errors()
    return records


def _nonfinite(
    value: Any, replaced: Collection[str], at: tuple[str | int, ...] = ()
) -> tuple[tuple[str | int, ...], float] | None:
    """The first NaN or infinity in a record: its path and value. Not what is `replaced` in a response."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (at, value)
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        response = len(at) == 2 and at[0] == "responses"
        items = ((key, v) for key, v in value.items() if not (response and key in replaced))
    elif isinstance(value, list):
        items = enumerate(value)
    return next((found for key, v in items if (found := _nonfinite(v, replaced, (*at, key)))), None)


def input_digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each input, for `identity`."""
    return [file_digest(path) for path in paths]


def recorded_setting(output: Path, name: str) -> Any:
    """Setting `name` of the run that made chunks of `output`, or finished it; None where nothing is made yet."""
    chunks, manifest = output.with_name(f"{output.name}.chunks"), output.with_name(f"{output.name}.manifest.json")
    identity = _read_json(chunks / "identity.json") if any(chunks.glob("[0-9]*.jsonl")) else None
    identity = identity or (_read_json(manifest) or {}).get("identity") or {}
    return identity.get("settings", {}).get(name)


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is whole or absent; a gzip, always the same for the same bytes, where its name ends with `.gz`."""
    with atomic_file(path) as raw, contextlib.ExitStack() as stack:
        yield (
            stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))  # type: ignore[arg-type]
            if path.suffix == ".gz"
            else raw
        )


class ChunkedStage:
    """The chunks of one output file.

    Args:
        output: the JSON-lines file that the stage makes; a gzip where the name ends with `.gz`.
        identity: everything that decides the result, as JSON: digests of the inputs, settings.
        records: the input, in order; a row of the output belongs to each, with the same `prompt_id`.
        chunk: prompts a chunk.
        job: this job, from 0; it makes chunks job, job + jobs, job + 2 jobs ...
        jobs: jobs that share the stage.

    Raises:
        DataError: the folder of chunks belongs to another input or to other settings, and some are done or being made.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, Any],
        records: Sequence[Record],
        *,
        chunk: int,
        job: int = 0,
        jobs: int = 1,
    ) -> None:
        self.output, self.records, self.chunk = output, records, chunk
        self.folder = output.with_name(f"{output.name}.chunks")
        self.manifest_path = output.with_name(f"{output.name}.manifest.json")
        self.count = -(-len(records) // chunk)
        self.mine = range(job, self.count, jobs)
        self.damaged: list[Path] = []  # found and set aside
        self._identity = json.loads(json.dumps({**identity, "chunk": chunk, "prompts": len(records)}))
        self._check_identity()

    def _check_identity(self) -> None:
        """Make the folder this run's, or raise; a run that failed before its first chunk does not keep it."""
        path = self.folder / "identity.json"
        if _read_json(path) == self._identity:
            return
        if not self._any_done() and self.output.exists():
            made = (_read_json(self.manifest_path) or {}).get("identity")
            if made != self._identity:
                raise DataError(f"{self.output} exists and was made otherwise: choose another output, or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "identity.lock", "a+", encoding="utf-8") as lock:
            for wait in (0.1,) * 20 + (None,):  # jobs that start together take turns; one that works keeps it
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    found = _read_json(path)
                    if found == self._identity:
                        return
                    if wait is None or self._any_done():
                        raise self._another_run(found) from None
                    time.sleep(wait)
            found = _read_json(path)
            if found == self._identity:
                return
            if found is not None and self._any_done():
                raise self._another_run(found)
            write_json_atomic(path, self._identity)

    def _any_done(self) -> bool:
        return any(self.folder.glob("[0-9]*.jsonl"))

    def _another_run(self, found: Any) -> DataError:
        shown = "; ".join(_differences(found or {}, self._identity)) or "identity.json is absent"
        return DataError(
            f"{self.folder} holds chunks of another run, or one makes them now ({shown}): go on with the same input "
            "and settings, choose another output, or remove the folder"
        )

    def part(self, index: int) -> Sequence[Record]:
        """The input records of a chunk."""
        return self.records[index * self.chunk : (index + 1) * self.chunk]

    def path(self, index: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{index:05d}.jsonl"

    def rows(self, index: int) -> list[Record] | None:
        """The finished rows of a chunk, or None; a damaged file is set aside as `.damaged` and counts as not made."""
        path = self.path(index)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            # not splitlines: a response may hold U+2028 or U+0085, which JSON leaves as they are
            rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
            whole = data.endswith(b"\n") and [r["prompt_id"] for r in rows] == [
                r["prompt_id"] for r in self.part(index)
            ]
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return rows
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        self.damaged.append(aside)
        return None

    def pending(self) -> list[int]:
        """This job's chunks that are not there yet."""
        return [i for i in self.mine if self.rows(i) is None]

    @contextlib.contextmanager
    def claim(self, index: int) -> Iterator[None]:
        """Hold a chunk while it is made. It may have been made since `pending` was asked: look again, with `rows`.

        Raises:
            DataError: another job is making it, or another run has taken the folder before its first chunk was done.
        """
        with contextlib.ExitStack() as stack:
            names = (self.folder / "identity.lock", self.path(index).with_suffix(".lock"))
            shared, lock = (stack.enter_context(open(name, "a+", encoding="utf-8")) for name in names)
            fcntl.flock(shared, fcntl.LOCK_SH)  # held alone for moments only
            found = _read_json(self.folder / "identity.json")
            if found != self._identity:
                raise self._another_run(found)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise DataError(
                    f"chunk {index} of {self.output} is being made by {lock.read().strip() or 'another job'}: two jobs "
                    "need two outputs, or the same `jobs` and different `job`"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield

    def write(self, index: int, rows: Sequence[Record]) -> None:
        """Put the rows of a chunk in their place, at once and durably.

        Raises:
            DataError: a row holds NaN or infinity; nothing is written then.
        """
        assert len(rows) == len(self.part(index)), "one row a prompt"
        try:
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
        except ValueError as e:
            raise DataError(f"chunk {index} of {self.output}: {e}") from None
        with atomic_file(self.path(index)) as file:
            for row, line in zip(rows, lines):
                try:
                    file.write(line.encode() + b"\n")
                except UnicodeEncodeError:  # half of a surrogate pair in a key of the user's own: kept, as an escape
                    file.write(json.dumps(row).encode() + b"\n")

    def finish(self, facts: Mapping[str, Any]) -> bool:
        """Join the chunks into the output where all are there; False where other jobs still have some to make."""
        missing = [i for i in range(self.count) if self.rows(i) is None]
        if missing:
            return False
        with output_file(self.output) as out:
            for index in range(self.count):
                out.write(self.path(index).read_bytes())
        manifest = {"identity": self._identity, **facts, "created": utc_now(), "versions": versions()}
        write_json_atomic(self.manifest_path, manifest)
        return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """`settings.n: 4 then, 5 now` for every field that differs, however deep."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        one, two = json.dumps(then), json.dumps(now)
        # of long values, from shortly before where they part
        parting = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
        start = max(0, parting - 10) if max(len(one), len(two)) > 60 else 0
        yield f"{name}: {_short(one, start)} then, {_short(two, start)} now"


def _short(text: str, start: int) -> str:
    return "..." * (start > 0) + text[start : start + 60] + "..." * (len(text) > start + 60)
