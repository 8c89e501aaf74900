"""Every damaged form of a record is named with file:line:col, and bad records never disturb the good ones."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafuse.data.jsonpos import column
from megafuse.data.reader import RecordReader, raw_lines
from megafuse.data.records import RecordError, Rules, ScoredPrompt, parse_record
from megafuse.errors import DataError

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def record(prompt_id: str = "p", **changes: Any) -> dict[str, Any]:
    responses = [
        {"source": "a", "text": "yes", "reward": 0.5},
        {"source": "b", "text": "no", "reward": -1, "extra": [1]},
    ]
    return {"prompt_id": prompt_id, "prompt": "Why?", "domain": "math", "responses": responses, **changes}


def response(**changes: Any) -> dict[str, Any]:
    found = {"source": "a", "text": "yes", "reward": 0.5, **changes}
    return record(
        responses=[{"source": "b", "text": "first", "reward": 1}, {k: v for k, v in found.items() if v != "-"}]
    )


def write(path: Path, lines: list[bytes | dict[str, Any]], end: bytes = b"\n") -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + end for x in lines))
    return path


def read(path: Path, **kwargs: Any) -> list[ScoredPrompt]:
    return list(RecordReader([path], **kwargs))


def test_reads_all_fields(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    full = {"source": "a", "text": "yes", "reward": 1, "correct": True, "model": "m", "finish_reason": "stop"}
    found = read(write(tmp_path / "x.jsonl", [record("1"), record("2", messages=messages, responses=[full], gold="4")]))
    assert found[0].messages == ({"role": "user", "content": "Why?"},)
    assert [(r.source, r.text, r.reward, r.correct) for r in found[0].responses] == [
        ("a", "yes", 0.5, None),
        ("b", "no", -1.0, None),
    ]
    assert found[1].messages == tuple(messages) and found[1].gold == "4" and found[1].line == 2
    assert vars(found[1].responses[0]) == {**full, "reward": 1.0}
    assert isinstance(found[1].responses[0].reward, float)


def test_gzip_bom_crlf_blank_lines(tmp_path: Path) -> None:
    plain = read(write(tmp_path / "x.jsonl", [record("1"), record("2")]))
    dressed = b"\xef\xbb\xbf" + b"\r\n".join(
        [json.dumps(record("1")).encode(), b"", b"  ", json.dumps(record("2")).encode()]
    )
    for path in (tmp_path / "y.jsonl", tmp_path / "z.jsonl.gz"):
        path.write_bytes(gzip.compress(dressed) if path.suffix == ".gz" else dressed)
        found = read(path)
        assert [(p.prompt_id, p.responses) for p in found] == [(p.prompt_id, p.responses) for p in plain]
        assert [p.line for p in found] == [1, 4]


BAD: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("cut", b'{"prompt_id": "p", "prom', r":2:20: not JSON: Unterminated string"),
    ("comma", b'{"prompt_id": "p",, }', r":2:19: not JSON"),
    ("two", b'{"a": 1} {"b": 2}', r":2:10: not JSON: Extra data"),
    ("list", b"  [1]", r":2:3: must be an object, got a list"),
    ("utf8", b'{"prompt_id": "\xff"}', r":2:16: not UTF-8.*0xff"),
    ("utf16", json.dumps(record()).encode("utf-16"), r":2:1: not UTF-8.*iconv"),
    ("digits", b'{"prompt_id": ' + b"9" * 5000 + b"}", r":2:1: not readable as JSON.*digits"),
    ("nested", b'{"a":' + b"[" * 100_000, r":2:1: not readable as JSON"),
    ("no id", {"prompt": "x"}, r":2:1: prompt_id: must be a string, got nothing"),
    ("int id", record(prompt_id=7), r":2:15: prompt_id: must be a string, got a number, 7"),  # type: ignore[arg-type]
    ("empty id", record(""), r":2:15: prompt_id: must not be empty"),
    ("no prompt", {"prompt_id": "p", "responses": []}, r":2:1: has neither 'messages' nor 'prompt'"),
    ("blank prompt", record(prompt=" \n"), r"prompt: must not be white space only"),
    ("messages", record(messages=[]), r"messages: must be a list of at least one"),
    ("content", record(messages=[{"role": "user", "content": [1]}]), r"messages\[0\].content: must be a string"),
    ("assistant", record(messages=[{"role": "assistant", "content": "x"}]), r"messages\[0\]: the last message"),
    ("domain", record(domain=3), r"domain: must be a string"),
    ("no responses", record(responses=[]), r"responses: must hold at least one"),
    ("absent responses", {"prompt_id": "p", "prompt": "x"}, r":2:1: responses: must be a list, got nothing"),
    ("null responses", record(responses=None), r"responses: must be a list, got null"),
    ("source", response(source=None), r"responses\[1\].source: must be a string, got null"),
    ("text", response(text=5), r"responses\[1\].text: must be a string"),
    ("surrogate", response(text="a\ud800"), r"responses\[1\].text: holds half of a surrogate"),
    ("empty text", response(text=""), r"responses\[1\].text: is empty \(source 'a'\); on_bad_response = \"drop\""),
    ("blank text", response(text=" \n\t"), r"responses\[1\].text: is empty"),
    (
        "no reward",
        response(reward="-", reward_logit=1),
        r"responses\[1\].reward: is missing.*has reward_logit: set rew",
    ),
    ("null reward", response(reward=None), r"responses\[1\].reward: is missing or null"),
    ("nan", response(reward=float("nan")), r"responses\[1\].reward: must be finite, got nan"),
    ("inf", response(reward=float("-inf")), r"responses\[1\].reward: must be finite, got -inf"),
    (
        "1e999",
        json.dumps(response()).replace("0.5", "1e999").encode(),
        r"responses\[1\].reward: must be finite, got inf",
    ),
    ("10**400", response(reward=10**400), r"responses\[1\].reward: must be finite"),
    ("bool reward", response(reward=True), r"responses\[1\].reward: must be a number, got a boolean"),
    ("text reward", response(reward="1"), r"responses\[1\].reward: must be a number, got a string"),
    ("correct", response(correct=1), r"responses\[1\].correct: must be true, false or null"),
]


@pytest.mark.parametrize(("line", "message"), [(b, m) for _, b, m in BAD], ids=[name for name, _, _ in BAD])
def test_bad_record_is_named(tmp_path: Path, line: bytes | dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.jsonl", [record("good"), line])
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert f"{path}:2:" in str(error.value) and "1 bad record(s)" in str(error.value)


def test_duplicate_names_both_lines(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", [record("a"), record("b")]), write(tmp_path / "2.jsonl", [record("b")])
    with pytest.raises(DataError) as error:
        list(RecordReader([one, two]))
    assert f"{two}:1:1: prompt_id 'b' was already seen at {one}:2" in str(error.value)


def test_first_twenty_errors_and_the_count(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [record("good"), *([b"{"] * 25), record("late")])
    reader = RecordReader([path])
    found = []
    with pytest.raises(DataError) as error:
        for item in reader:
            found.append(item.prompt_id)
    text = str(error.value)
    assert found == ["good"] and "25 bad record(s)" in text and "... and 5 more" in text
    assert f"{path}:21:2:" in text and f"{path}:22:" not in text


def test_damaged_gzip_is_never_skipped(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps(record(str(i))).encode() + b"\n" for i in range(2000)))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"x.jsonl.gz:\d+:1: the gzip stream is damaged"):
        read(path, on_bad_record="skip")
    with pytest.raises(DataError, match="No such file"):
        list(raw_lines(tmp_path / "absent.jsonl"))


def test_bad_responses_can_be_dropped(tmp_path: Path) -> None:
    bad = [
        {"source": "a", "text": " "},
        {"source": "a", "text": "x"},
        {"source": "a", "text": "x", "reward": float("nan")},
    ]
    path = write(tmp_path / "x.jsonl", [record(responses=[*bad, {"source": "b", "text": "ok", "reward": 2}])])
    reader = RecordReader([path], Rules(drop_bad_responses=True))
    assert [r.text for p in reader for r in p.responses] == ["ok"]
    for reason in ("empty_text", "missing_reward", "nonfinite_reward"):
        assert reader.counts[f"responses_dropped.{reason}"] == 1
    assert reader.counts["responses"] == 4


def test_other_forms(tmp_path: Path) -> None:
    unscored = record(responses=[{"source": "a", "text": "x", "reward": None}])
    path = write(tmp_path / "x.jsonl", [unscored])
    assert read(path, rules=Rules("responses"))[0].responses[0].reward is None
    bare = write(tmp_path / "y.jsonl", [{"prompt_id": "p", "prompt": "x"}])
    assert read(bare, rules=Rules("prompts"))[0].responses == ()
    logit = write(tmp_path / "z.jsonl", [response(reward_logit=3)])
    with pytest.raises(
        DataError, match=r"responses\[0\].reward_logit: is missing or null; the response has reward: set"
    ):
        read(logit, rules=Rules(reward_field="reward_logit"))


SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,  ", "\t:\t ")])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x, max_size=4),
    max_leaves=15,
)


@given(JSON, SEPARATORS, st.booleans(), st.data())
def test_column_points_at_the_value(
    value: Any, separators: tuple[str, str], ascii_only: bool, data: st.DataObject
) -> None:
    text = "  " + json.dumps(value, separators=separators, ensure_ascii=ascii_only)
    path: list[str | int] = []
    while isinstance(value, dict | list) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        path.append(key)
        value = value[key]
    start = column(text, tuple(path)) - 1
    assert json.JSONDecoder().raw_decode(text, start)[0] == value
    assert column(text, (*path, "no such key \0")) == start + 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["good", "cut", "empty", "twin", "nan", "blank"]), max_size=30), st.booleans())
def test_quarantine_keeps_the_good_in_order(plan: list[str], packed: bool) -> None:
    lines: list[bytes] = []
    good, bad = [], []
    for number, what in enumerate(plan, 1):
        if what == "blank":
            lines.append(b"")
            continue
        if what == "twin" and not good:
            what = "good"
        if what == "good":
            good.append((f"p{number}", number))
        else:
            bad.append(number)
        made = {
            "good": record(f"p{number}"),
            "empty": {**response(text=""), "prompt_id": f"p{number}"},
            "nan": {**response(reward=float("nan")), "prompt_id": f"p{number}"},
            "twin": record(good[0][0] if good else ""),
        }
        lines.append(json.dumps(made[what]).encode() if what in made else b'{"prompt_id": "\xe4')
    with tempfile.TemporaryDirectory() as folder:
        path, quarantine = Path(folder) / "x.jsonl", Path(folder) / "out" / "q.jsonl"
        data = b"\n".join(lines)
        path.write_bytes(gzip.compress(data) if packed else data)
        reader = RecordReader([path], on_bad_record="skip", quarantine=quarantine)
        for _ in range(2):  # a second run starts the quarantine file anew
            assert [(p.prompt_id, p.line) for p in reader] == good
        rows = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
        assert [row["line"] for row in rows] == bad
        for row in rows:
            assert row["record"] == lines[row["line"] - 1].decode("utf-8", errors="backslashreplace")
        wanted = {(str(path), line) for _, line in good[::2]}
        assert [(p.prompt_id, p.line) for p, _ in reader.at(wanted)] == good[::2]


@settings(max_examples=300)
@given(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()))
def test_parser_raises_nothing_else(raw: bytes) -> None:
    with pytest.raises(RecordError) as error:  # nothing that hypothesis invents is a record
        parse_record(raw, Rules())
    assert 1 <= error.value.col <= len(raw) + 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not beside the repository")
def test_real_files() -> None:
    path = DATA / "alpacaeval_fusion.jsonl.gz"
    reader = RecordReader([path], Rules(reward_field="reward_logit"))
    with pytest.raises(DataError, match=r"16 bad record\(s\)"):
        list(reader)
    assert all("responses[1].text: is empty" in e.reason for e in reader.errors)
    tolerant = RecordReader([path], Rules(reward_field="reward_logit", drop_bad_responses=True))
    assert len(list(tolerant)) == 608 and tolerant.counts["responses_dropped.empty_text"] == 16
    for name, prompts in (("gsm8k_openai4", 986), ("zh_fusion", 115)):
        assert len(read(DATA / f"{name}.jsonl.gz")) == prompts
