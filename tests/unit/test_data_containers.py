"""Other kinds of files where JSON lines are wanted: one message that says what it is and what to do."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megafuse.cli.main import main
from megafuse.data.chunks import read_raw
from megafuse.data.reader import RecordReader
from megafuse.data.records import Rules
from megafuse.errors import DataError
from megafuse.testing.tokenizer import make_tokenizer

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

RECORDS = [
    {
        "prompt_id": f"p{i}",
        "messages": [{"role": "user", "content": f'"{i}" \u00e9\u4f60\u2028'}],
        "responses": [{"source": s, "text": f"{s}\n{n}", "reward": n + 0.1} for s in "ab" for n in range(2)],
    }
    for i in range(3)
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def stored(save: Callable[[Any, Path], object], path: Path) -> bytes:
    save(datasets.Dataset.from_list(RECORDS), path)
    return path.read_bytes()


def arrow(kind: Callable[..., Any]) -> bytes:
    table = datasets.Dataset.from_list(RECORDS).data.table
    with io.BytesIO() as sink:
        with kind(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()


def zipped() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("inside.jsonl", LINES)
        return file.getvalue()


# what it is: (bytes, the tool that the fix needs, None: Python)
KINDS: dict[str, tuple[Callable[[Path], bytes], str | None]] = {
    "a Parquet file": (lambda at: stored(lambda data, path: data.to_parquet(str(path)), at), None),
    "an Arrow file": (lambda at: arrow(pyarrow.ipc.new_stream), None),
    "an Arrow file, of the other form": (lambda at: arrow(pyarrow.ipc.new_file), None),
    "a zip archive": (lambda at: zipped(), "unzip"),
    "compressed with zstd": (lambda at: bytes.fromhex("28b52ffd") + b"\0" * 99, ""),
    "compressed with xz": (lambda at: lzma.compress(LINES), "xz"),
    "compressed with bzip2": (lambda at: bz2.compress(LINES), "bzip2"),
    "one JSON array": (lambda at: json.dumps(RECORDS).encode(), None),
    "one JSON array, indented": (lambda at: b"\xef\xbb\xbf\r\n" + json.dumps(RECORDS, indent=2).encode(), None),
    "JSON with objects over several lines": (lambda at: json.dumps(RECORDS[0], indent=1).encode() + b"\n", "jq"),
}


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_one_message_that_names_it(tmp_path: Path, what: str, packed: bool) -> None:
    data = KINDS[what][0](tmp_path / "made")
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress(data) if packed else data)
    named = what.partition(",")[0]
    for reader in (RecordReader([path]), RecordReader([path], on_bad_record="skip", quarantine=tmp_path / "q")):
        with pytest.raises(DataError, match=f"x.jsonl is {named}, not JSON lines .*; fix: ") as caught:
            list(reader)
        assert reader.error_count == 0 and "\n" not in str(caught.value)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("what", [w for w, (_, tool) in KINDS.items() if tool != ""])
@pytest.mark.parametrize("packed", [False, True])
def test_the_command_makes_json_lines_of_it(tmp_path: Path, what: str, packed: bool) -> None:
    """As it is printed, in a shell; names that a shell would read otherwise."""
    make, tool = KINDS[what]
    if tool and not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    if packed and tool in ("xz", "bzip2"):
        pytest.skip("nobody packs twice")
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    suffix = {"xz": ".xz", "bzip2": ".bz2"}.get(tool or "", "")
    path = folder / f"some data.jsonl{suffix}"
    data = make(tmp_path / "made")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError) as caught:
        list(RecordReader([path]))
    (bin := tmp_path / "bin").mkdir()
    (bin / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin / "python").chmod(stat.S_IRWXU)
    here = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "cache")}
    command = str(caught.value).partition("; fix: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=folder, env=here, capture_output=True)
    (made,) = [p for p in folder.iterdir() if p != path and p.suffix != ".unpacked"]
    wanted = RECORDS[:1] if what == "JSON with objects over several lines" else RECORDS
    assert read_raw(made, "scored") == wanted


def test_names_do_not_tell_a_gzip(tmp_path: Path) -> None:
    for name, data in (("plain.jsonl.gz", LINES), ("packed.jsonl", gzip.compress(LINES))):
        (tmp_path / name).write_bytes(data)
        assert read_raw(tmp_path / name, "scored") == RECORDS


@pytest.mark.parametrize(
    "first", [b"[INFO] ready", b"{}", b"[1]", b"PAR", b"{ ", b"P", b"\xff\xff", b"BZ", b"[", b"", b'{"a": 1}']
)
def test_a_bad_line_is_no_other_kind_of_file(tmp_path: Path, first: bytes) -> None:
    """Only what begins such a file counts; a bad first line is skipped as any other. A lone bracket is neither."""
    (tmp_path / "x.jsonl").write_bytes(
        first + b" \n" * (first not in (b"[", b"{ ")) + (LINES if first != b"[" else b"")
    )
    reader = RecordReader([tmp_path / "x.jsonl"], on_bad_record="skip")
    if first == b"[":
        with pytest.raises(DataError, match="one JSON array"):
            list(reader)
    else:
        assert len(list(reader)) == 3 - (first == b"{ ")


def commands(tmp_path: Path) -> dict[str, list[str]]:
    x, out = str(tmp_path / "x.jsonl"), str(tmp_path / "out")
    make_tokenizer(tmp_path / "tokenizer")
    build = ["--kind", "pair", "--alpha", "1", "--vocab_size", "512", "--tokenizer", str(tmp_path / "tokenizer")]
    return {
        "data check": ["data", "check", x],
        "data report": ["data", "report", x, "--output", f"{out}.html"],
        "build": ["build", "--inputs", x, "--output", out, *build],
        "score": ["score", "--inputs", x, "--output", out, "--reward", "keep"],
        "score, prompts": ["score", "--inputs", f"{x}.good", "--prompts", x, "--output", out, "--reward", "keep"],
        "sample": ["sample", "--prompts", x, "--source", "a", "--model", "m", "--engine", "server", "--output", out],
        "bench": ["bench", "--data.path", x, "--model.path", "tiny", "--loss", "dpo", "--sources", "2"],
    }


def test_every_command_that_reads_records_says_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(KINDS["a Parquet file"][0](tmp_path / "made"))
    (tmp_path / "x.jsonl.good").write_bytes(LINES)
    for name, words in commands(tmp_path).items():
        assert main(words) == 2, name
        shown = capfd.readouterr()
        said = [line for line in (shown.out + shown.err).splitlines() if "x.jsonl" in line]
        assert len(said) == 1 and "x.jsonl is a Parquet file, not JSON lines" in said[0], (name, shown)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_json_cannot_hold_has_a_place(tmp_path: Path, number: str) -> None:
    """Of everything that is written again: rewards that are kept, and whatever else a record carries."""
    line = json.dumps(RECORDS[1]).replace('"reward": 1.1', f'"reward": {number}', 1)
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(RECORDS[0])}\n\n{line}\n")
    col = line.index(f" {number}") + 2
    with pytest.raises(DataError, match=rf"x.jsonl:3:{col}: responses\[1\].reward: must be finite, got -?(nan|inf)"):
        read_raw(path, "responses", replaced=())
    assert len(read_raw(path, "responses", replaced=("reward",))) == len(read_raw(path, "responses")) == 2
    assert len(read_raw(path, "prompts", replaced=())) == 2  # whose responses are not written again
    line = json.dumps(RECORDS[2])[:-1] + f', "note": {{"a": [0, {number}]}}}}'
    path.write_text(line + "\n")
    for form in ("prompts", "responses"):
        with pytest.raises(DataError, match=rf"x.jsonl:1:{line.rindex(number) + 1}: note.a\[1\]: must be finite"):
            read_raw(path, form, replaced=("reward",))
    assert list(RecordReader([path], Rules()))  # a build does not write it again


def test_score_keep_names_the_place_before_it_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps(RECORDS[0]).replace('"reward": 0.1', '"reward": NaN', 1)
    (tmp_path / "x.jsonl").write_text(line + "\n")
    score = ["score", "--inputs", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--reward"]
    assert main([*score, "keep"]) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"x.jsonl:1:{line.index('NaN') + 1}: responses[0].reward: must be finite, got nan" in said
    assert not (tmp_path / "out.jsonl.chunks").exists()
    assert main([*score, "correct"]) == 0  # the reward is another one then
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()
