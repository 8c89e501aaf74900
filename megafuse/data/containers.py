"""Files that are no JSON lines at all, told by how they begin: one message for the file, not one for each line."""

import json
import shlex
from pathlib import Path

from megafuse.errors import DataError

_TABLE = 'import pandas; pandas.{read}({{i}}).to_json({{o}}, orient="records", lines=True)'
_ARRAY = 'import json; [print(json.dumps(record)) for record in json.load(open({i}, encoding="utf-8-sig"))]'
# (how it begins, what it is, the command that makes JSON lines of it; {i}: this file, {o}: a name for the other one).
# Python where it is a line of it, else a shell command.
_KNOWN: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", _TABLE.format(read="read_parquet")),
    (b"ARROW1\0\0", "an Arrow file", _TABLE.format(read="read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow file", "from datasets import Dataset; Dataset.from_file({i}).to_json({o})"),
    (b"PK\x03\x04", "a zip archive", "unzip {i}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d {i} -o {o}"),
    (b"\xfd7zXZ\0", "compressed with xz", "xz -dk {i}"),
    (b"BZh", "compressed with bzip2", "bzip2 -dk {i}"),
)  # fmt: skip


def refuse_container(path: Path, head: bytes, *, packed: bool) -> None:
    """Raise DataError where `head`, the first bytes of a file (if `packed`: in its gzip), begins no JSON lines."""
    what, command = _kind(head)
    if not what:
        return
    place, unpack = path, ""
    if packed:
        place = _beside(path, "unpacked")
        unpack = f"gzip -dc {_quoted(path)} > {_quoted(place)} && "
    raise DataError(f"{path} is {what}, not JSON lines (one object a line); fix: {unpack}{_filled(command, place)}")


def _kind(head: bytes) -> tuple[str, str]:
    """(what it is, the command that makes JSON lines of it); empty for what may be JSON lines."""
    for magic, what, command in _KNOWN:
        if head.startswith(magic):
            return what, command
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"[" and text[1:].lstrip()[:1] in (b"", b"{", b"]"):
        return "one JSON array", _ARRAY
    if text.split(b"\n", 1)[0].strip() == b"{" and b"\n" in text:
        return "JSON with objects over several lines", "jq -c . {i} > {o}"
    return "", ""


def _filled(command: str, path: Path) -> str:
    lines = _beside(path, "lines.jsonl")
    if not command.startswith(("from ", "import ")):
        return command.format(i=_quoted(path), o=_quoted(lines))
    code = command.format(i=json.dumps(str(path)), o=json.dumps(str(lines)))
    return f"python -c {shlex.quote(code)}" + (f" > {_quoted(lines)}" if command == _ARRAY else "")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}.{ending}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
