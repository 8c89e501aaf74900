"""From lines to groups: disk equals definition, every prompt is accounted for, and nothing is left halfway."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megafuse.cli.build import run as run_build
from megafuse.config.build import BuildConfig
from megafuse.data.build import build
from megafuse.data.dataset import GroupDataset
from megafuse.data.split import draws, side_of
from megafuse.data.tokenise import ChatTokenizer
from megafuse.data.weights import source_weights
from megafuse.errors import ConfigError, DataError
from megafuse.testing.ranking import best_and_worst, falling, sha
from megafuse.testing.tokenizer import CHATML, make_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
WORDS = ["the", "answer", "is", "not", "what", "you", "think", "it", "was", "but", "42", "may", "be", "near"]


def records(n: int, seed: int, sources: str = "abc") -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    return [
        {
            "prompt_id": f"p{rng.getrandbits(40)}",
            "prompt": text(12),
            "domain": rng.choice(["math", "coding"]),
            "responses": [
                {"source": rng.choice(sources), "text": text(30), "reward": rng.choice([0.1, 0.2, rng.random()])}
                for _ in range(rng.randint(1, 8))
            ],
        }
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tokenizer(tmp_path_factory.mktemp("model"), 512)
    (path / "config.json").write_text('{"vocab_size": 512}')
    return path


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Any:
    """`make(rows, name, **settings)` builds a data set and returns (data set, manifest)."""

    def run(rows: list[dict[str, Any]], name: str = "out", **settings: Any) -> GroupDataset:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(r) + "\n" for r in rows))
        settings = {"inputs": (source,), "output": tmp_path / name, "tokenizer": model, "part": "all", **settings}
        return GroupDataset(build(BuildConfig(**settings)).path)

    return run


def accounted(ds: GroupDataset) -> None:
    """Every prompt and every response of the input is kept or counted."""
    counts = ds.manifest["counts"]
    lost = sum(v for k, v in counts.items() if k.startswith(("prompts_left_out.", "prompts_dropped.")))
    assert counts["prompts"] == counts["prompts_kept"] + lost and counts["prompts_kept"] == len(ds)


def same(one: GroupDataset, two: GroupDataset) -> None:
    assert one.manifest["digest"] == two.manifest["digest"] and one.prompt_ids == two.prompt_ids


@pytest.mark.parametrize("kind", ["sft", "pair", "rloo", "wrpo", "rank"])
def test_groups_equal_their_definition(make: Any, model: Path, kind: str) -> None:
    """An independent reading of the method over plain dictionaries."""
    rows = records(300, seed=random.randrange(10**9))
    extra = {"target_source": "a"} if kind == "wrpo" else {}
    ds = make(rows, kind=kind, k=2 if kind in ("sft", "pair", "rloo") else None, alpha=0.05, **extra)
    ds.verify()
    accounted(ds)
    tokenizer = ChatTokenizer(model)
    by_id = {r["prompt_id"]: r for r in rows}
    assert ds.prompt_ids == sorted(ds.prompt_ids)
    for group, domain in zip(ds, ds.domains):
        row = by_id.pop(group.prompt_id)
        assert domain == row["domain"]
        want = expected_terms(row, kind)
        got = [tuple((group.sources[j], group.rewards[j]) for j in term if j >= 0) for term in group.members]
        assert got == [tuple((r["source"], r["reward"]) for r in term) for term in want]
        if want:
            head = {"wrpo": [0.0]}.get(kind, [max(r["reward"] for r in term) for term in want])
            np.testing.assert_array_equal(group.weights, source_weights(head, 0.05))
        kept = (
            row["responses"]
            if kind == "rank"
            else [r for r in row["responses"] if any(r is x for term in want for x in term)]
        )
        assert group.sources == tuple(r["source"] for r in kept)
        messages = [{"role": "user", "content": row["prompt"]}]
        np.testing.assert_array_equal(group.prompt, tokenizer.prompts([messages])[0])
        for ids, r in zip(group.responses, kept):
            np.testing.assert_array_equal(ids, tokenizer.answers([r["text"]])[0].whole)
    for row in by_id.values():
        assert not expected_terms(row, kind)


def expected_terms(record: dict[str, Any], kind: str) -> list[list[dict[str, Any]]]:
    responses, name = record["responses"], record["prompt_id"]

    def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return rows[best_and_worst(rows, name)[0]]

    def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return rows[best_and_worst(rows, name)[1]]

    def first_two(terms: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        return sorted(terms, key=lambda t: (-best(t)["reward"], sha(0, name, t[0]["source"])))[:2]

    def alike(rows: list[dict[str, Any]]) -> bool:
        return len({r["text"] for r in rows}) == 1

    sources = {s: [r for r in responses if r["source"] == s] for s in dict.fromkeys(r["source"] for r in responses)}
    if kind == "sft":
        return [[responses[i]] for i in falling(responses, name)[:2]]
    if kind == "pair":
        pairs = [[best(y), worst(y)] for y in sources.values() if best(y)["reward"] > worst(y)["reward"]]
        return first_two([pair for pair in pairs if not alike(pair)])
    if kind == "rloo":
        return first_two([y for y in sources.values() if len(y) > 1 and not alike(y)])
    if kind == "wrpo":
        own, others = sources.get("a", []), [r for r in responses if r["source"] != "a"]
        usable = len(own) > 1 and others and best(own)["reward"] > worst(own)["reward"]
        pair = [best(own), worst(own)] if usable else []
        return [[others[falling(others, name)[0]], *pair]] if pair and not alike(pair) else []
    return []


def test_the_order_of_the_input_does_not_matter(make: Any, tmp_path: Path, model: Path) -> None:
    rows = records(600, seed=1)
    one = make(rows, "one", kind="pair")
    two = make(random.Random(2).sample(rows, len(rows)), "two", kind="pair")
    same(one, two)
    halves = [tmp_path / "h1.jsonl", tmp_path / "h2.jsonl"]
    for path, part in zip(halves, (rows[300:], rows[:300])):
        path.write_text("\n".join(map(json.dumps, part)))
    config = BuildConfig(inputs=tuple(halves), output=tmp_path / "three", tokenizer=model, part="all", kind="pair")
    build(config)
    same(one, GroupDataset(tmp_path / "three"))
    rows[0]["responses"][0]["reward"] += 1e-16 + 1e-9
    assert make(rows, "four", kind="rank").manifest["digest"]["data"] != one.manifest["digest"]["data"]


def test_split_and_max_prompts(make: Any) -> None:
    rows = records(400, seed=3)
    ids = [r["prompt_id"] for r in rows]
    parts = {p: make(rows, p, kind="rank", part=p, seed=5, holdout=0.2) for p in ("sft", "po", "eval", "train")}
    for part, ds in parts.items():
        wanted = ("sft", "po") if part == "train" else (part,)
        assert ds.prompt_ids == sorted(i for i in ids if side_of(i, seed=5, holdout=0.2) in wanted)
        accounted(ds)
    small = make(rows, "small", kind="rank", seed=5, max_prompts=40)
    assert small.prompt_ids == sorted(sorted(ids, key=lambda i: draws(i, 5).order)[:40])
    accounted(small)
    assert set(small.prompt_ids) < set(make(rows, "larger", kind="rank", seed=5, max_prompts=60).prompt_ids)
    # more data moves no prompt: the old prompts of the part are all there
    assert set(parts["sft"].prompt_ids) < set(
        make(rows + records(100, 4), "more", kind="sft", part="auto", seed=5, holdout=0.2).prompt_ids
    )
    with pytest.raises(DataError, match=r"no group is left in part 'eval'.*holdout is 0"):
        make(rows, "none", kind="rank", part="auto")


def test_filters(make: Any) -> None:
    rows = records(80, seed=6)
    ds = make(rows, kind="rank", domains=("math",), exclude_sources=("b",), responses_per_source=1)
    accounted(ds)
    want = {}
    for row in rows:
        first = dict.fromkeys(r["source"] for r in row["responses"] if r["source"] != "b")
        if row["domain"] == "math" and first:
            want[row["prompt_id"]] = tuple(first)
    assert {g.prompt_id: g.sources for g in ds} == want
    assert set(make(rows, "only", kind="rank", include_sources=("c",)).manifest["responses_by_source"]) == {"c"}


def lengths(prompt: int, *answers: int) -> dict[str, Any]:
    """A record whose answers have these numbers of tokens before the end of turn (a letter of two bytes is two)."""
    responses = [{"source": "a", "text": "\u00e9" * (n // 2), "reward": i} for i, n in enumerate(answers)]
    return {"prompt_id": "p", "prompt": "\u00e9" * (prompt // 2), "responses": responses}


def test_length_rules(make: Any, model: Path) -> None:
    row = lengths(20, 10, 30, 50)
    frame = len(ChatTokenizer(model).prompts([[{"role": "user", "content": "\u00e9" * 10}]])[0])  # type: ignore[arg-type]
    exact = make([row], "fits", kind="rank", max_length=frame + 31)
    assert [len(r) for r in exact[0].responses] == [11, 31], "31 = 30 + the end of turn just fit"
    assert exact.manifest["counts"]["responses_dropped.long_response"] == 1
    assert exact.manifest["max_sequence_tokens"] == frame + 31
    cut = make([row], "cut", kind="rank", max_length=frame + 30, on_long_response="truncate_end")
    assert [len(r) for r in cut[0].responses] == [11, 30, 30] and [r[-1] == 2 for r in cut[0].responses] == [
        True,
        False,
        False,
    ]
    whole = make([row], "whole", kind="rank")
    for short, full in zip(cut[0].responses[1:], whole[0].responses[1:]):
        np.testing.assert_array_equal(short, full[:30])
    assert cut.manifest["counts"]["responses_truncated"] == 2
    assert cut.manifest["counts"]["responses_without_end_of_turn"] == 2
    keep = {**lengths(4, 10), "prompt_id": "q"}
    ds = make([row, keep], "prompt", kind="rank", max_prompt_length=frame - 1)
    assert ds.prompt_ids == ["q"] and ds.manifest["counts"]["prompts_dropped.long_prompt"] == 1
    accounted(ds)
    size = frame + 10 + 30 + 50 + 3
    with pytest.raises(DataError, match=rf"1 group.*max_row_tokens = {size - 1}; the longest, 'p', has {size} tokens"):
        make([row, keep], "row", kind="rank", max_row_tokens=size - 1)
    assert make([row, keep], "row2", kind="rank", max_row_tokens=size).manifest["max_group_tokens"] == size
    dropped = make([row, keep], "row3", kind="rank", max_row_tokens=size - 1, on_long_group="drop")
    assert dropped.prompt_ids == ["q"] and dropped.manifest["counts"]["prompts_dropped.long_group"] == 1


def test_a_cut_answer_keeps_no_part_of_its_end_of_turn(make: Any) -> None:
    frame = len(make([lengths(20, 30)], "frame", kind="rank")[0].prompt)
    settings = {"kind": "rank", "end_of_turn": "!!<|im_end|>", "on_long_response": "truncate_end"}
    for room in (30, 31):  # 31: the text and one token of its end would fit
        (ids,) = make([lengths(20, 30)], f"room{room}", max_length=frame + room, **settings)[0].responses
        assert len(ids) == 30


def test_unfinished_answers(make: Any) -> None:
    row = lengths(4, 10, 20)
    row["responses"][1]["finish_reason"] = "length"
    row["responses"][0]["finish_reason"] = "stop"
    assert len(make([row], "a", kind="rank")[0].responses) == 1
    kept = make([row], "b", kind="rank", on_unfinished="no_end_of_turn")
    assert [(len(r), int(r[-1] == 2)) for r in kept[0].responses] == [(11, 1), (20, 0)]


CUT = "the first thirty characters are all that fits"


def test_pairs_that_are_cut_to_the_same_tokens(make: Any) -> None:
    """cases: pairs/identical_after_truncation. The pair of the other source has the whole weight."""
    answers = [("x", f"{CUT} ONE", 0.2), ("x", f"{CUT} TWO", 0.1), ("y", "a short one", 0.19), ("y", "bad", 0.1)]
    row = {
        "prompt_id": "p",
        "prompt": "hm",
        "responses": [{"source": s, "text": t, "reward": r} for s, t, r in answers],
    }
    long = make([row], "long", kind="pair")[0]
    assert len(long.members) == 2 and long.weights[0] > 0.8
    frame = len(long.prompt)
    cut = make([row], "cut", kind="pair", max_length=frame + 15, on_long_response="truncate_end")
    (group,) = cut
    assert group.weights.tolist() == [1.0] and set(group.sources) == {"y"}
    assert cut.manifest["counts"]["terms_dropped.same_tokens"] == 1
    assert cut.manifest["counts_by_source"]["x"]["terms_dropped.same_tokens"] == 1


def test_pairs_that_the_template_trims_to_the_same_tokens(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "trim.jinja"
    template.write_text(CHATML.replace("message['content']", "message['content'] | trim"))
    rows = [lengths(8, 12)]
    rows[0]["responses"] = [
        {"source": s, "text": t, "reward": r}
        for s, t, r in (("x", "the answer\n", 0.2), ("x", "the answer", 0.1), ("y", "one", 0.19), ("y", "two", 0.1))
    ]
    (group,) = made = make(rows, kind="pair", chat_template=template)
    assert group.weights.tolist() == [1.0] and set(group.sources) == {"y"}
    assert made.manifest["counts"]["terms_dropped.same_tokens"] == 1
    rows[0]["responses"][2]["source"] = "z"
    with pytest.raises(DataError, match=r"no group is left.*target_same_tokens 1"):
        make(rows, "wrpo", kind="wrpo", target_source="x", chat_template=template)


def test_rloo_sources_of_equal_rewards_are_told(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "prompt_id": "p",
        "prompt": "q",
        "responses": [{"source": "ab"[n > 1], "text": f"t {n}", "reward": float(n == 2)} for n in range(4)],
    }
    made = make([row], kind="rloo")
    assert len(made[0].members) == 2, "kept: the KL term may tell them apart"
    assert made.manifest["counts"]["terms_kept.equal_rewards"] == 1
    assert made.manifest["counts_by_source"]["a"]["terms_kept.equal_rewards"] == 1
    assert run_build(BuildConfig(**{**made.manifest["config"], "inputs": (tmp_path / "out.jsonl",)})) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "source a: in 1 prompts all of its rewards are equal" in out and "source b: in" not in out


@pytest.mark.parametrize("text_config", [True, False])
def test_sequences_beyond_the_models_positions_are_told(make: Any, tmp_path: Path, text_config: bool) -> None:
    folder = make_tokenizer(tmp_path / "short", 512)
    row = lengths(8, 12, 20)
    ds = make([row], "free", kind="rank")
    limit = len(ds[0].prompt) + min(map(len, ds[0].responses))  # the shortest response fits exactly
    positions = {"max_position_embeddings": limit}
    config = {"vocab_size": 512, **({"text_config": positions} if text_config else positions)}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = make([row], kind="rank", tokenizer=folder).manifest
    assert manifest["counts"]["responses_beyond_max_position_embeddings"] == 1
    (warning,) = manifest["warnings"]
    longest = manifest["max_sequence_tokens"]
    assert f"longest of {longest} tokens" in warning and f"max_position_embeddings = {limit}" in warning
    positions["max_position_embeddings"] = longest
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, **positions}))
    fits = make([row], "fits", kind="rank", tokenizer=folder).manifest
    assert not fits["warnings"] and "responses_beyond_max_position_embeddings" not in fits["counts"]


def test_restart_and_overwrite(make: Any, tmp_path: Path, model: Path) -> None:
    rows = records(30, seed=7)
    first = make(rows, kind="sft")
    stamp = os.stat(first.path).st_ino
    config = BuildConfig(inputs=(tmp_path / "out.jsonl",), output=first.path, tokenizer=model, part="all", kind="sft")
    assert not build(config).fresh and os.stat(first.path).st_ino == stamp
    moved = tmp_path / "renamed.jsonl"
    moved.write_bytes((tmp_path / "out.jsonl").read_bytes())
    assert not build(config.model_copy(update={"inputs": (moved,), "alpha": 1e-2, "overwrite": True})).fresh
    for change in ({"alpha": 2e-2}, {"seed": 1}, {"k": 3}, {"max_length": 100}):
        with pytest.raises(DataError, match="built differently: set overwrite"):
            build(config.model_copy(update=change))
    with pytest.raises(DataError, match="built differently"):
        make(rows[1:], kind="sft")
    assert build(config.model_copy(update={"k": 1, "overwrite": True})).fresh
    assert GroupDataset(first.path).manifest["responses"] == len(GroupDataset(first.path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.jsonl", "renamed.jsonl"]


def test_never_replaces_other_folders(make: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not a megafuse data set"):
        make(records(3, seed=8), kind="sft", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_interrupted_build_leaves_nothing(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(records(20, seed=9), kind="sft")
    monkeypatch.setattr("megafuse.data.build.file_sizes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(records(20, seed=10), kind="sft", overwrite=True)
    monkeypatch.undo()
    assert GroupDataset(old.path).manifest == old.manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.jsonl"]


def test_bad_records(make: Any, tmp_path: Path) -> None:
    rows = records(20, seed=11)
    good = make(rows, "good", kind="rank")
    bad = [*rows[:5], {"prompt_id": "x"}, *rows[5:], rows[0]]
    with pytest.raises(DataError, match=r"(?s)2 bad record.*out.jsonl:6:1: has neither.*already seen at .*out.jsonl:1"):
        make(bad, kind="rank")
    assert not (tmp_path / "out").exists()
    skipped = make(bad, kind="rank", on_bad_record="skip")
    same(good, skipped)
    assert skipped.manifest["counts"]["bad_records"] == 2
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataError, match=r"responses\[0\].score: is missing"):
        make(rows, "score", kind="rank", reward_field="score")


def test_conversations_that_the_template_refuses(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
    rows = records(5, seed=12)
    good = make(rows, "good", kind="rank", chat_template=template)
    rows.insert(
        2,
        {**records(1, seed=13)[0], "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    )
    with pytest.raises(DataError, match=r"out.jsonl:3:1: p\d+: the chat template refuses.*no system"):
        make(rows, kind="rank", chat_template=template)
    skipped = make(rows, kind="rank", chat_template=template, on_bad_record="skip")
    same(good, skipped)
    accounted(skipped)
    (row,) = map(json.loads, (tmp_path / "out.quarantine.jsonl").read_text().splitlines())
    assert (row["line"], json.loads(row["record"])) == (3, rows[2])


def test_input_that_changes_meanwhile(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records(5, seed=14)))
    config = BuildConfig(inputs=(source,), output=tmp_path / "out", tokenizer=model, part="all", kind="rank")
    with pytest.raises(DataError, match="changed while it was read"):
        build(config, progress=lambda *_: os.utime(source, ns=(1, 1)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sft", "selection": "per_source"}, "not one of kind 'sft': top_k_all"),
        ({"kind": "wrpo"}, "target_source must be set"),
        ({"kind": "pair", "target_source": "a"}, "target_source must be set"),
        ({"kind": "pair", "min_gap": 1.0, "max_gap": 0.5}, "min_gap = 1.0 is above"),
        ({"kind": "sft", "min_gap": 1.0}, "for kind pair"),
        ({"kind": "rloo", "use_correct": True}, "use_correct is for"),
        ({"kind": "pair", "selection": "top1", "k": 2}, "keeps one"),
        ({"kind": "sft", "max_prompt_length": 2048}, "max_prompt_length = 2048"),
        ({"kind": "sft", "include_sources": ("a",), "exclude_sources": ("a",)}, "both included and excluded: a"),
        ({"kind": "sft", "alpha": 0.0}, "alpha"),
        ({"kind": "sft", "holdout": 1.5}, "holdout"),
    ],
)
def test_configurations_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BuildConfig(inputs=(Path("x"),), output=Path("y"), tokenizer=Path("z"), **settings)


def test_the_papers_defaults() -> None:
    def config(**settings: Any) -> BuildConfig:
        return BuildConfig(inputs=(Path("x"),), output=Path("y"), tokenizer=Path("z"), **settings)

    found = {kind: config(kind=kind) for kind in ("sft", "pair", "rloo", "rank")}
    assert [(c.resolved_part, c.resolved_alpha, c.resolved_k) for c in found.values()] == [
        ("sft", 1e-2, 4),
        ("po", 5e-3, None),
        ("po", 5e-3, None),
        ("eval", 1.0, None),
    ]
    assert config(kind="pair", selection="top1").resolved_k == 1
    assert config(kind="sft", selection="top1_per_source").resolved_k is None


def test_settings_of_the_template(make: Any, tmp_path: Path) -> None:
    """System messages, think blocks, and what is told of answers; a data set from before the settings is the same."""
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
    user = {"role": "user", "content": "What is it?"}
    texts = ["It is 6.", "<think>\nSix.\n</think>\n\nIt is 6.", "It is <|im_end|>"]
    responses = [{"source": f"s{i}", "text": text, "reward": i / 10} for i, text in enumerate(texts)]
    row = {"prompt_id": "p", "messages": [{"role": "system", "content": "Be brief."}, user], "responses": responses}
    folded = {**row, "messages": [{**user, "content": "Be brief.\n\nWhat is it?"}]}
    settings = {"kind": "rank", "chat_template": template}
    with pytest.raises(DataError, match=r'no system; where it knows no system role, set system_messages = "first_user'):
        make([row], "refused", **settings)
    ds = make([row], "folded", system_messages="first_user_turn", **settings)
    assert ds.manifest["digest"]["data"] == make([folded], "plain", **settings).manifest["digest"]["data"]
    assert ds.manifest["settings"]["system_messages"] == "first_user_turn"
    assert ds.manifest["counts_by_source"]["s2"]["responses_with_control_tokens_in_their_text"] == 1
    thinking = make([folded], "thinking", thinking="in_answers", **settings)
    assert thinking[0].sources == ("s1",) and thinking.manifest["counts"]["responses_dropped.no_thinking"] == 2
    before = make([folded], "before", **settings).manifest["settings"]
    assert not {"thinking", "system_messages", "domain_rules"} & set(before)


def test_wrong_tokenizer(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 100"):
        make(records(3, seed=15), kind="rank", vocab_size=100)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not beside the repository")
def test_real_data(tmp_path: Path, model: Path) -> None:
    """Graded math answers of five families: pairs are correct against incorrect, in the order of file and hash."""
    source = DATA / "gsm8k_fusion.jsonl.gz"
    config = BuildConfig(
        inputs=(source,), output=tmp_path / "o", tokenizer=model, kind="pair", use_correct=True, max_prompts=60
    )
    build(config.model_copy(update={"max_length": 8192}))
    ds = GroupDataset(tmp_path / "o")
    ds.verify()
    accounted(ds)
    assert 0 < len(ds) <= 60 and ds.manifest["counts"]["prompts"] == 986
    for group in ds:
        assert (group.rewards[group.members] == [1.0, 0.0]).all()
        assert len({group.sources[w] for w, _ in group.members}) == len(group.members)
        np.testing.assert_array_equal(group.weights, np.full(len(group.members), 1 / len(group.members)))
