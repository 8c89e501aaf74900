"""Chat templates of many shapes: what is accepted, what is refused, and that every token is what generation sees."""

import contextlib
import hashlib
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megafuse.data.chat import lead_of, load_tokenizer
from megafuse.data.render import folded as folded_messages
from megafuse.data.tokenise import ChatTokenizer, token_counter
from megafuse.errors import ConfigError, DataError
from megafuse.testing.chat_families import CHAT_FAMILIES
from megafuse.testing.tokenizer import CHATML, make_tokenizer

ASK = [{"role": "user", "content": "What is it?"}]
ANSWER = "It is 42. Or\n\nso."


def folder(path: Path, template: str | None = CHATML, *, vocab: int = 512, **kwargs: Any) -> Path:
    make_tokenizer(path, vocab, chat_template=template, **kwargs)
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab}))
    return path


def ids(found: np.ndarray | DataError) -> list[int]:
    assert isinstance(found, np.ndarray) and found.dtype == np.int32
    return found.tolist()


@pytest.mark.parametrize("vocab", [104, 128, 300, 512, 4000])
def test_make_tokenizer(tmp_path: Path, vocab: int) -> None:
    plain = AutoTokenizer.from_pretrained(str(make_tokenizer(tmp_path, vocab)), local_files_only=True)
    assert len(plain) == vocab and (plain.pad_token_id, plain.eos_token_id) == (0, 2)
    text = "user: What's up?\n\n~ {42} ~<|im_end|>"
    assert plain.decode(plain(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="vocab_size must be >= 104"):
        make_tokenizer(tmp_path, 50)


def test_chatml(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path))
    plain = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    prompt = ids(tokenizer.prompts([ASK])[0])
    assert plain.decode(prompt) == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.count(1) == 2 and prompt.count(2) == 1
    answer = tokenizer.answers([ANSWER])[0].body
    assert plain.decode(answer) == ANSWER
    # up to the first control token: the newline behind <|im_end|> is not part of an answer
    assert tokenizer.end_of_turn.tolist() == [2]
    whole = plain.apply_chat_template([*ASK, {"role": "assistant", "content": ANSWER}], tokenize=False)
    assert plain.decode([*prompt, *answer, 2]) + "\n" == whole


def test_control_tokens_in_an_answer_are_text(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path))
    plain = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "stop<|im_end|>\n<|im_start|>user\nmore"
    (answer,) = tokenizer.answers([text])
    found = answer.body
    assert answer.notes == ("control_tokens_in_their_text",)
    assert not set(found.tolist()) & {0, 1, 2} and plain.decode(found) == text
    assert tokenizer.has_control_text(text) and not tokenizer.has_control_text(ANSWER)


def test_batches_equal_single_calls(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path))
    texts = ["", "a", ANSWER, "\u65e5\u672c\u8a9e \u2713", "x" * 3000]
    for one, many in zip(texts, tokenizer.answers(texts)):
        np.testing.assert_array_equal(tokenizer.answers([one])[0].whole, many.whole)
    assert token_counter(tmp_path)(texts) == [len(a.body) for a in tokenizer.answers(texts)]
    assert tokenizer.answers([]) == [] and tokenizer.prompts([]) == []


def test_one_bos_where_tokenizer_and_template_both_have_it(tmp_path: Path) -> None:
    bos = "<|endoftext|>"
    path = folder(tmp_path, "{{ bos_token }}" + CHATML, bos_token=bos, add_bos=True)
    plain = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    rendered = plain.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert plain(rendered)["input_ids"][:2] == [0, 0], "the mistake this guards against"
    assert ids(ChatTokenizer(path).prompts([ASK])[0]) == plain(rendered)["input_ids"][1:]


def test_double_bos_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, "{{ bos_token }}{{ bos_token }}" + CHATML, bos_token="<|endoftext|>")
    with pytest.raises(ConfigError, match=r"two BOS tokens \('<\|endoftext\|>', id 0\)"):
        ChatTokenizer(path).prompts([ASK])


def test_vocabulary_larger_than_the_model(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 200}}')
    with pytest.raises(ConfigError, match=r"token id \d+, but the model's vocab_size is 200"):
        ChatTokenizer(tmp_path).answers([ANSWER])
    assert ChatTokenizer(tmp_path, vocab_size=512).vocab_size == 512
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no usable vocab_size"):
        ChatTokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config.json: set vocab_size"):
        ChatTokenizer(tmp_path)


def test_missing_template_and_override(tmp_path: Path) -> None:
    path = folder(tmp_path / "base", None)
    with pytest.raises(ConfigError, match=r"no chat template.*chat_template\.jinja; `build` and `sample` take one as"):
        ChatTokenizer(path)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    found = ChatTokenizer(path, chat_template=tmp_path / "chatml.jinja")
    same = ChatTokenizer(folder(tmp_path / "chat"))
    assert ids(found.prompts([ASK])[0]) == ids(same.prompts([ASK])[0])
    assert (found.template_digest, found.digest) == (same.template_digest, same.digest)
    with pytest.raises(ConfigError, match="not readable"):
        ChatTokenizer(path, chat_template=tmp_path / "absent.jinja")


@pytest.mark.parametrize("name", ["qwen_3_thinks", "r1_distill_qwen"])
def test_tokens_are_counted_whatever_the_template_is(name: str, tmp_path: Path) -> None:
    """`data check` and `data report` have no settings for it, and need none."""
    path = CHAT_FAMILIES[name].write(tmp_path)
    with pytest.raises(ConfigError):
        ChatTokenizer(path)
    theirs = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    assert token_counter(path)([ANSWER, ""]) == [len(theirs(ANSWER, add_special_tokens=False)["input_ids"]), 0]
    base, chat = folder(tmp_path / "base", None), folder(tmp_path / "chat")
    assert token_counter(base)([ANSWER]) == token_counter(chat)([ANSWER])


def test_templates_with_names(tmp_path: Path) -> None:
    """Some folders hold several: the default one is taken."""
    rules = CHAT_FAMILIES["qwen_2.5"]
    others = [{"name": "rag", "template": "?"}, {"name": "tool_use", "template": "?"}]
    for name, templates in (("a", others), ("b", [*others, {"name": "default", "template": rules.template}])):
        file = rules.write(tmp_path / name) / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
    same = ChatTokenizer(rules.write(tmp_path / "c"))
    assert ids(ChatTokenizer(tmp_path / "b").prompts([ASK])[0]) == ids(same.prompts([ASK])[0])
    with pytest.raises(
        ConfigError, match=r"no default specified.*\['rag', 'tool_use'\]\. Put the one to use in the folder"
    ):
        ChatTokenizer(tmp_path / "a")


def test_missing_folder_and_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        ChatTokenizer("some-org/some-model")  # never looked up anywhere
    with pytest.raises(ConfigError, match=r"no tokenizer: none of tokenizer\.json, .* is there$"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no loadable tokenizer"):
        ChatTokenizer(tmp_path)


def test_no_remote_code(tmp_path: Path) -> None:
    folder(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file.write_text(json.dumps(config | {"tokenizer_class": "Evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with contextlib.suppress(ConfigError):
        ChatTokenizer(tmp_path)
    assert not (tmp_path / "canary").exists()


def body(message: str, generate: str = "<|im_start|>assistant\n") -> str:
    """A ChatML-like template whose assistant turn is `message`."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        + message
        + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + generate
        + "{% endif %}"
    )


@pytest.mark.parametrize(
    ("filter_", "want"),
    [
        ("", " \n x \n"),
        (" | trim", "x"),
        (".lstrip()", "x \n"),
        (".rstrip()", " \n x"),
        (".lstrip('\n')", " \n x \n"),
        (".strip('\n')", " \n x "),
        (".rstrip(' \n')", " \n x"),
    ],
)
def test_templates_that_trim(tmp_path: Path, filter_: str, want: str) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path, body("{{ m.content" + filter_ + " }}<|im_end|>\n")))
    (found,) = tokenizer.answers([" \n x \n"])
    assert found.notes == (("white_space_in_front",) if want[0].isspace() else ())
    np.testing.assert_array_equal(found.body, tokenizer._encode([want], control=False)[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (body("<think>\n\n</think>\n\n{{ m.content }}<|im_end|>"), r"writes '<think>.*enable_thinking"),
        (body("{{ m.content }}<|im_end|>", generate="<|im_start|>bot\n"), "does not continue its own prompt"),
        (body("{{ m.content | upper }}<|im_end|>"), "changes the text of an answer"),
        (body("{{ m.content | replace('\n', ' ') }}<|im_end|>"), "changes white space"),
        (body("{{ m.content }}"), r"writes nothing after an answer.*end_of_turn = \"<\|im_end\|>\""),
        (CHATML + "{{ raise_exception('never') }}", "fails on a user message.*: never$"),
        ("{% for %}", "fails on a user message"),
        (CHATML + "{{ 1 / 0 }}", "fails on a user message.*ZeroDivisionError"),
        (CHATML + "{{ messages[7].content }}", "fails on a user message.*UndefinedError"),
        (CHATML + "{{ messages[0].nothing + 1 }}", "fails on a user message"),
        (CHATML + "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "fails on a user message.*RecursionError"),
        (CHATML + "{{ range(10 ** 30) }}", "fails on a user message.*OverflowError"),
    ],
)
def test_templates_that_are_refused(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        ChatTokenizer(folder(tmp_path, template))


def test_template_variables(tmp_path: Path) -> None:
    think = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    path = folder(tmp_path, body("<think></think>{{ m.content }}<|im_end|>", "<|im_start|>assistant\n" + think))
    with pytest.raises(ConfigError, match="enable_thinking"):
        ChatTokenizer(path)
    tokenizer = ChatTokenizer(path, template_kwargs={"enable_thinking": False})
    assert tokenizer.template.prompt(ASK).endswith("<think></think>")
    other = ChatTokenizer(path, template_kwargs={"enable_thinking": False, "x": 1})
    assert other.template_digest != tokenizer.template_digest


def test_the_day_of_the_build_is_not_in_the_prompt(tmp_path: Path) -> None:
    clock = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = ChatTokenizer(folder(tmp_path / "a", clock + "{{ date_string }}" + CHATML))
    assert tokenizer.template.prompt(ASK).startswith("26 Jul 2024") and not tokenizer.template.depends_on_date
    assert ChatTokenizer(folder(tmp_path / "b", "{{ strftime_now('%Y') }}" + CHATML)).template.depends_on_date


def test_end_of_turn_of_several_tokens(tmp_path: Path) -> None:
    words = ChatTokenizer(folder(tmp_path / "a", body("{{ m.content }}\n### End\n")))
    assert words.end_of_turn.tolist() == words._encode(["\n### End\n"], control=False)[0]
    given = ChatTokenizer(folder(tmp_path / "b", body("{{ m.content }}")), end_of_turn="\n<|im_end|>")
    assert given.end_of_turn.tolist()[-1] == 2 and len(given.end_of_turn) == 2
    two = ChatTokenizer(folder(tmp_path / "c", body("{{ m.content }}<|im_end|>\n<|endoftext|>")))
    assert two.end_of_turn.tolist() == [2], "generation stops at the first control token"


@pytest.mark.parametrize("end", ["\n", "\n\n", "\n### End", ".", "\n<|im_end|>"])
def test_an_end_of_turn_that_melts_into_the_end_of_an_answer(tmp_path: Path, end: str) -> None:
    """Qwen has one token for a full stop and a line break: neither is part of the other's text."""
    path = CHAT_FAMILIES["qwen_2.5"].write(tmp_path)
    tokenizer = ChatTokenizer(path, end_of_turn=end)
    theirs = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    assert len(theirs(".\n", add_special_tokens=False)["input_ids"]) == 1
    assert theirs.decode(tokenizer.end_of_turn) == end
    texts = ["It is 42.", "It is", "a line.\n", "<|im_start|> it is.", "<|im_start|> it is"]
    for text, answer in zip(texts, tokenizer.answers(texts)):
        assert theirs.decode(answer.body) == text and theirs.decode(answer.whole) == text + end
        # of an answer that spells out a control token, what stands behind that
        plain = theirs(text.removeprefix("<|im_start|>") + end, add_special_tokens=False)["input_ids"]
        assert answer.whole.tolist()[-len(plain) :] == plain


def test_a_template_that_opens_no_answer(tmp_path: Path) -> None:
    """Nothing stands before the answer, and so no blank of the tokenizer does."""
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    path = replace(CHAT_FAMILIES["tinyllama"], template=template).write(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    (answer,) = ChatTokenizer(path).answers(["4 is it."])
    question, whole = theirs(["What is it?", "What is it?4 is it.</s>"], add_special_tokens=False)["input_ids"]
    assert [*question, *answer.whole] == whole


def test_a_conversation_that_the_template_refuses(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = ChatTokenizer(folder(tmp_path, strict))
    found = tokenizer.prompts([ASK, [{"role": "system", "content": "x"}, *ASK], ASK])
    assert isinstance(found[1], DataError) and "no system role" in str(found[1])
    assert ids(found[0]) == ids(found[2])


def test_a_prompt_that_changes_once_it_is_answered(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "x"}, *ASK]
    once = "{% if messages[0].role == 'system' and messages[-1].role == 'assistant' %}?{% endif %}"
    tokenizer = ChatTokenizer(folder(tmp_path / "end", CHATML + once))
    (found,) = tokenizer.prompts([system])
    assert isinstance(found, DataError) and "differently once it is answered" in str(found)
    # only the history differs: what generation sees is the prompt
    history = ChatTokenizer(folder(tmp_path / "history", once + CHATML))
    same = ChatTokenizer(folder(tmp_path / "same"))
    assert ids(history.prompts([system])[0]) == ids(same.prompts([system])[0])
    other = "{% if messages[0].role == 'system' and add_generation_prompt %}!{% endif %}"
    (found,) = ChatTokenizer(folder(tmp_path / "opening", CHATML + other)).prompts([system])
    assert isinstance(found, DataError) and "this conversation differently: it ends with" in str(found)


def test_an_answer_that_the_template_writes_otherwise(tmp_path: Path) -> None:
    """Whatever it writes before or behind one answer only: it is not what the model would generate there."""
    behind = body("{{ m.content }}<|im_end|>\n{% if m.content == 'y' %}Sure{% endif %}")
    found = ChatTokenizer(folder(tmp_path / "behind", behind)).answers(["It is 6.", "y"])
    assert [answer.dropped for answer in found] == ["", "template_refuses_it"]
    qwen = CHAT_FAMILIES["qwen_3_answers"]
    tokenizer = ChatTokenizer(qwen.write(tmp_path / "qwen"), template_kwargs=qwen.kwargs)
    (thought,) = tokenizer.answers(["<think>\nSix.\n</think>\n\nIt is 6."])
    assert thought.dropped == "template_refuses_it" and not len(thought.whole)


def test_answers_of_white_space_are_none(tmp_path: Path) -> None:
    """Also where the template would write them."""
    found = ChatTokenizer(folder(tmp_path)).answers(["", " ", "\n\t\u3000", "\u200b"])
    assert [answer.dropped for answer in found] == ["no_token"] * 3 + [""]


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, wherever it begins to loop, and an alarm that was set before goes off all the same."""
    monkeypatch.setattr("megafuse.data.render.RENDER_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"template loops: it did not end within 0\.2 s, .* begins with 'What is 6"):
        ChatTokenizer(folder(tmp_path / "always", CHATML + LOOP))
    tokenizer = ChatTokenizer(
        folder(tmp_path / "sometimes", "{% if 'loop' in messages[-1].content %}" + LOOP + "{% endif %}" + CHATML)
    )
    assert ids(tokenizer.prompts([ASK])[0])
    for act in (
        lambda: tokenizer.prompts([[{"role": "user", "content": "loop"}]]),
        lambda: tokenizer.answers(["loop"]),
    ):
        with pytest.raises(ConfigError, match="template loops"):
            act()
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tokenizer.prompts([ASK])
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ConfigError, match="template loops"):
            tokenizer.prompts([[{"role": "user", "content": "loop"}]])
        deadline = time.monotonic() + 30
        while not rung and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert rung


def test_a_tokenizer_that_gives_back_one_blank_more(tmp_path: Path) -> None:
    """Some of the SentencePiece kind do not take away the blank that they put before a text."""
    path = CHAT_FAMILIES["tinyllama"].write(tmp_path)
    file = path / "tokenizer.json"
    core = json.loads(file.read_text())
    core["decoder"]["decoders"] = [part for part in core["decoder"]["decoders"] if part["type"] != "Strip"]
    file.write_text(json.dumps(core))
    assert load_tokenizer(path).decode(load_tokenizer(path)("It is")["input_ids"]) == " It is"


def test_a_tokenizer_that_loses_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers before 5.22 makes of R1-Distill-Llama: a byte-level vocabulary without its splitting."""
    sound, broken = folder(tmp_path / "sound"), folder(tmp_path / "broken")
    file = broken / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": None}))
    with pytest.raises(ConfigError, match=r"(?s)loses text: \"It is far, .* comes back from its ids as \"Itisfar,"):
        ChatTokenizer(broken)
    assert load_tokenizer(broken, may_lose_text=True)  # a reward model that was trained so
    right = ChatTokenizer(sound).answers([ANSWER])[0].whole
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **kwargs: load(str(broken), **kwargs))
    np.testing.assert_array_equal(ChatTokenizer(sound).answers([ANSWER])[0].whole, right)  # tokenizer.json as it stands


def test_a_system_message_becomes_the_beginning_of_the_question(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = ChatTokenizer(folder(tmp_path, strict), fold_system=True)
    system = [{"role": "system", "content": "Be brief."}, *ASK]
    folded = [{"role": "user", "content": "Be brief.\n\nWhat is it?"}]
    found = tokenizer.prompts([system, folded, [{"role": "system", "content": ""}, *ASK], ASK])
    assert ids(found[0]) == ids(found[1]) and ids(found[2]) == ids(found[3])
    for others in ([], [{"role": "assistant", "content": "Hello."}, *ASK]):  # nowhere to put it
        assert folded_messages([system[0], *others]) == [system[0], *others]
    (refused,) = ChatTokenizer(tmp_path).prompts([system])
    assert isinstance(refused, DataError) and 'set system_messages = "first_user_turn"' in str(refused)


THINKS = body("{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n", "<|im_start|>assistant\n<think>\n")


def test_answers_that_hold_their_think_blocks(tmp_path: Path) -> None:
    """Qwen 3's template opens no block, R1-Distill's prompts end in one: it is there once, and closed."""
    with pytest.raises(ConfigError, match=r'does not continue its own prompt.*thinking = "in_answers"'):
        ChatTokenizer(folder(tmp_path / "r1", THINKS))
    opens = ChatTokenizer(tmp_path / "r1", thinking_in_answers=True)
    plain = ChatTokenizer(folder(tmp_path / "qwen"), thinking_in_answers=True)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "qwen"), local_files_only=True)
    texts = ["\n<think>\nSix.\n</think>\n\nIt is 6. ", "Six.\n</think>\n\nIt is 6. ", "It is 6.", "<think>\nSix, or"]
    inside = "Six.\n</think>\n\nIt is 6. "
    for tokenizer, want in ((opens, inside), (plain, f"<think>\n{inside}")):
        found = tokenizer.answers(texts)
        assert [answer.dropped for answer in found] == ["", "", "no_thinking", "no_thinking"]
        assert [theirs.decode(answer.whole) for answer in found[:2]] == [want + "<|im_end|>"] * 2
        assert [answer.notes for answer in found[:2]] == [(), ()]  # an opening tag that the prompt has is not left out
    assert theirs.decode(ids(opens.prompts([ASK])[0])).endswith("<|im_start|>assistant\n<think>\n")


def test_a_think_block_keeps_its_blank_lines(tmp_path: Path) -> None:
    """An empty one too: behind the prompt stands what was generated there."""
    tokenizer = ChatTokenizer(folder(tmp_path, THINKS), thinking_in_answers=True)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in ("<think>\n\n</think>\n\nIt is 6.", "<think>\n\n  Six.\n</think>It is 6.", "<think>Six.</think>6"):
        (found,) = tokenizer.answers([text])
        assert theirs.decode(found.body) == text.removeprefix("<think>").removeprefix("\n")


def test_a_prompt_that_closes_the_think_block_of_answers_that_hold_one(tmp_path: Path) -> None:
    rules = CHAT_FAMILIES["qwen_3_thinks"]
    with pytest.raises(ConfigError, match=r"(?s)closes the think block of every prompt.*enable_thinking = false out"):
        ChatTokenizer(rules.write(tmp_path), template_kwargs={"enable_thinking": False}, thinking_in_answers=True)


def test_think_blocks_of_control_tokens(tmp_path: Path) -> None:
    """In answers that hold them they are those tokens; other control tokens are text."""
    rules = CHAT_FAMILIES["qwen_3_thinks"]
    path = replace(rules, words=(), control=(*rules.control, *rules.words)).write(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    text = "<think>\nSix.\n</think>\n\nIt is 6."
    (found,) = ChatTokenizer(path, thinking_in_answers=True).answers([text])
    assert found.body.tolist() == theirs(text, add_special_tokens=False)["input_ids"] and found.notes == ()
    assert set(theirs.convert_tokens_to_ids(["<think>", "</think>"])) <= set(found.body.tolist())


def test_what_a_template_leaves_out_of_an_answer_is_told(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path, body("{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n")))
    cut, whole = tokenizer.answers(["<think>Six.</think> It is 6.", " It is 6. "])
    assert cut.notes == ("text_left_out",) and whole.notes == ()
    np.testing.assert_array_equal(cut.whole, whole.whole)


def test_characters_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    path = folder(tmp_path, vocab=128)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unk_token": "<|endoftext|>"}))
    found = ChatTokenizer(path).answers(["It is \u65e5.", "It is 6."])
    assert [answer.notes for answer in found] == [("unknown_tokens",), ()]


def test_the_blank_that_belongs_to_the_template(tmp_path: Path) -> None:
    """Before a generated answer it is no part of it."""
    leads = {}
    for name in ("llama_2", "mistral_0.3", "mistral_nemo", "qwen_2.5", "r1_distill_qwen"):
        leads[name] = lead_of(load_tokenizer(CHAT_FAMILIES[name].write(tmp_path / name)))
    assert leads == {"llama_2": " ", "mistral_0.3": " ", "mistral_nemo": "", "qwen_2.5": "", "r1_distill_qwen": ""}


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_data_sets_of_before_are_told_apart_where_their_tokens_differ(name: str, tmp_path: Path) -> None:
    """The digest is the one of before where answers began as they do now; where they began with a stray blank, not."""
    rules = CHAT_FAMILIES[name]
    tokenizer = ChatTokenizer(
        rules.write(tmp_path), template_kwargs=rules.kwargs, thinking_in_answers=rules.thinking_in_answers
    )
    before = hashlib.sha256(f"{tokenizer.template.digest}:{tokenizer.end_of_turn.tolist()}".encode()).hexdigest()
    stray = name in ("mistral_0.1_older", "zephyr", "tinyllama", "chatml_on_llama_2", "yi")
    assert (tokenizer.template_digest != before) == stray


@pytest.mark.parametrize(
    ("end", "melts"), [("<|im_end|>", False), (" END", False), ("\n", True), ("\n<|im_end|>", True)]
)
def test_data_sets_of_before_are_told_apart_where_their_ends_differ(end: str, melts: bool, tmp_path: Path) -> None:
    """That of before was encoded by itself."""
    tokenizer = ChatTokenizer(CHAT_FAMILIES["qwen_2.5"].write(tmp_path), end_of_turn=end)
    alone = tokenizer._encode([end], control=True)[0]
    before = hashlib.sha256(f"{tokenizer.template.digest}:{alone}".encode()).hexdigest()
    assert (tokenizer.template_digest != before) == melts
