"""Streams records out of files, collects the bad ones, and decides: refuse the input, or set them aside."""

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megafuse.data.containers import refuse_container
from megafuse.data.records import BadRecord, RecordError, Rules, ScoredPrompt, parse_record
from megafuse.errors import ConfigError, DataError

SHOWN_ERRORS = 20
_HEAD = 512  # bytes that tell a file's kind


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes (of the compressed bytes where it is compressed)."""
    digest = hashlib.sha256()
    with _open(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None


def check_output(output: Path, inputs: Iterable[Path], *, field: str = "output") -> None:
    """Refuse to write where the bytes of an input are.

    Raises:
        ConfigError: the output is a folder, or the same file as an input, under whatever name.
    """
    if output.is_dir():
        raise ConfigError(f"{field} = {output} is a folder: give the name of a file")
    for path in inputs:
        if output.resolve() == path.resolve() or (output.exists() and path.exists() and output.samefile(path)):
            raise ConfigError(f"{field} = {output} is an input, which would be overwritten: choose another name")


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without the line end) of a text file or of a gzip of one; blank lines left out.

    Raises:
        DataError: the file cannot be opened, is of another kind (Parquet, an archive, one JSON array), or its gzip
            stream is damaged or cut (never skipped: what follows the damage is lost).
    """
    with _open(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        number = 0
        try:
            refuse_container(path, stream.peek(_HEAD), packed=packed)
            for number, line in enumerate(stream, 1):
                if stripped := line.strip(b" \t\r\n"):
                    if stripped == b"\xef\xbb\xbf":
                        continue
                    yield number, line.rstrip(b"\r\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise DataError(
                f"{path}:{number + 1}:1: the gzip stream is damaged here: {e}. Copy the file again"
            ) from None


class RecordReader:
    """Iterates over the good records of some files, in their order.

    `on_bad_record="refuse"` (default): the first bad record stops the records, the rest is still checked, and the end
    of the iteration raises `DataError` with the first 20 errors and their number. `"skip"`: bad records go to the
    quarantine file, one JSON object each (`file, line, col, error, record`), and the good ones keep their order. Of
    records with the same `prompt_id` the first counts; the others are bad. `advice`: what the refusal says a user can
    do, where the command has a setting for it.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        rules: Rules | None = None,
        *,
        on_bad_record: Literal["refuse", "skip"] = "refuse",
        quarantine: Path | None = None,
        advice: str = "",
    ) -> None:
        self.paths = [Path(p) for p in paths]
        self.rules = rules or Rules()
        self.on_bad_record = on_bad_record
        self.quarantine = quarantine
        self.advice = advice
        self.errors: list[BadRecord] = []  # the first 20
        self.error_count = 0
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[ScoredPrompt]:
        """All good records.

        Raises:
            DataError: at the end, if there are bad records and they are to be refused.
        """
        if self.quarantine is not None:
            self.quarantine.unlink(missing_ok=True)  # of an earlier run
        seen: dict[str, tuple[str, int]] = {}
        for path in self.paths:
            for line, raw in raw_lines(path):
                self.counts["records"] += 1
                record = self._parse(path, line, raw, seen)
                if record is not None and (self.on_bad_record == "skip" or not self.error_count):
                    yield record
        if self.on_bad_record == "refuse":
            self.raise_errors()

    def _parse(self, path: Path, line: int, raw: bytes, seen: dict[str, tuple[str, int]]) -> ScoredPrompt | None:
        try:
            record, dropped = parse_record(raw, self.rules, file=str(path), line=line)
            first = seen.setdefault(record.prompt_id, (str(path), line))
            if first != (str(path), line):
                raise RecordError(f"prompt_id {record.prompt_id!r} was already seen at {first[0]}:{first[1]}")
        except RecordError as e:
            self.bad(BadRecord(str(path), line, e.col, e.reason), raw)
            return None
        self.counts["responses"] += len(record.responses) + sum(dropped.values())
        for reason, number in dropped.items():
            self.counts[f"responses_dropped.{reason}"] += number
        return record

    def bad(self, error: BadRecord, raw: bytes) -> None:
        """Note a bad record; where bad records are skipped, append it to the quarantine file."""
        self.error_count += 1
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(error)
        if self.on_bad_record == "skip" and self.quarantine is not None:
            row = {"file": error.file, "line": error.line, "col": error.col, "error": error.reason}
            row["record"] = raw.decode("utf-8", errors="backslashreplace")
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=True) + "\n")

    def raise_errors(self) -> None:
        """Raise `DataError` with the first 20 bad records and their number, if there is any."""
        if self.error_count:
            shown = "\n  ".join(str(e) for e in self.errors)
            more = self.error_count - len(self.errors)
            raise DataError(
                f"{self.error_count} bad record(s){self.advice and '; '}{self.advice}:\n  {shown}"
                + (f"\n  ... and {more} more" if more else "")
            )

    def at(self, wanted: Collection[tuple[str, int]]) -> Iterator[tuple[ScoredPrompt, bytes]]:
        """The records at these (file, line), with their raw bytes: a second pass over files that were read before.

        Other lines are not even parsed.
        """
        for path in self.paths:
            for line, raw in raw_lines(path):
                if (str(path), line) in wanted:
                    record, _ = parse_record(raw, self.rules, file=str(path), line=line)
                    yield record, raw
