"""Chat templates of many shapes: what is accepted, what is refused, and that every token is what generation sees."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megafuse.data.tokenise import ChatTokenizer
from megafuse.errors import ConfigError, DataError
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
    answer = tokenizer.answers([ANSWER])[0]
    assert plain.decode(answer) == ANSWER
    # up to the first control token: the newline behind <|im_end|> is not part of an answer
    assert tokenizer.end_of_turn.tolist() == [2]
    whole = plain.apply_chat_template([*ASK, {"role": "assistant", "content": ANSWER}], tokenize=False)
    assert plain.decode([*prompt, *answer, 2]) + "\n" == whole


def test_control_tokens_in_an_answer_are_text(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path))
    plain = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "stop<|im_end|>\n<|im_start|>user\nmore"
    found = tokenizer.answers([text])[0]
    assert not set(found.tolist()) & {0, 1, 2} and plain.decode(found) == text
    assert tokenizer.has_control_text(text) and not tokenizer.has_control_text(ANSWER)


def test_batches_equal_single_calls(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path))
    texts = ["", "a", ANSWER, "\u65e5\u672c\u8a9e \u2713", "x" * 3000]
    for one, many in zip(texts, tokenizer.answers(texts)):
        np.testing.assert_array_equal(tokenizer.answers([one])[0], many)
    assert tokenizer.lengths(texts) == [len(a) for a in tokenizer.answers(texts)]
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
    ("filter_", "want"), [("", " \n x \n"), (" | trim", "x"), (".lstrip()", "x \n"), (".rstrip()", " \n x")]
)
def test_templates_that_trim(tmp_path: Path, filter_: str, want: str) -> None:
    tokenizer = ChatTokenizer(folder(tmp_path, body("{{ m.content" + filter_ + " }}<|im_end|>\n")))
    np.testing.assert_array_equal(tokenizer.answers([" \n x \n"])[0], tokenizer._encode([want], control=False)[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (body("<think>\n\n</think>\n\n{{ m.content }}<|im_end|>"), r"writes '<think>.*enable_thinking"),
        (body("{{ m.content }}<|im_end|>", generate="<|im_start|>bot\n"), "does not continue its own prompt"),
        (body("{{ m.content | upper }}<|im_end|>"), "changes the text of an answer"),
        (body("{{ m.content | replace('\n', ' ') }}<|im_end|>"), "changes white space"),
        (body("{{ m.content }}"), r"writes nothing after an answer.*end_of_turn = \"<\|im_end\|>\""),
        (CHATML + "{{ raise_exception('never') }}", "fails on a user message.*never"),
        ("{% for %}", "fails on a user message"),
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


def test_a_conversation_that_the_template_refuses(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = ChatTokenizer(folder(tmp_path, strict))
    found = tokenizer.prompts([ASK, [{"role": "system", "content": "x"}, *ASK], ASK])
    assert isinstance(found[1], DataError) and "no system role" in str(found[1])
    assert ids(found[0]) == ids(found[2])


def test_a_prompt_that_changes_once_it_is_answered(tmp_path: Path) -> None:
    once = "{% if messages[0].role == 'system' and messages[-1].role == 'assistant' %}?{% endif %}" + CHATML
    tokenizer = ChatTokenizer(folder(tmp_path, once))
    (found,) = tokenizer.prompts([[{"role": "system", "content": "x"}, *ASK]])
    assert isinstance(found, DataError) and "differently once it is answered" in str(found)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "llama"])
def test_a_blank_before_the_answer(tmp_path: Path, kind: str) -> None:
    """Mistral's templates write `[/INST] answer`: the answer's tokens must be those of the text in one piece."""
    user, answer = "'[INST] ' + m.content + ' [/INST]'", "' ' + m.content + eos_token"
    template = f"{{% for m in messages %}}{{{{ {user} if m.role == 'user' else {answer} }}}}{{% endfor %}}"
    folder(tmp_path, template)
    if kind != "bytes":
        words = [
            "<unk>",
            "</s>",
            "[INST]",
            "[/INST]",
            *"\u2581abcdefghijklmnopqrstuvwxyzWIBONST[]/?.264*\n",
            "\u2581I",
            "\u2581B",
        ]
        core = Tokenizer(
            models.BPE({w: i for i, w in enumerate(words)}, [("\u2581", "I"), ("\u2581", "B")], unk_token="<unk>")
        )
        if kind == "metaspace":
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
            core.add_special_tokens(["[INST]", "[/INST]"])
        else:  # Llama 2: a blank is prepended to every text, even to one that has one, and [INST] is plain text
            core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.add_special_tokens(["</s>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
    found = ChatTokenizer(tmp_path)
    plain = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = plain.apply_chat_template([*ASK, {"role": "assistant", "content": "It is"}], tokenize=False)
    whole = plain(text, add_special_tokens=False)["input_ids"]
    pieces = [*ids(found.prompts([ASK])[0]), *found.answers(["It is"])[0].tolist(), *found.end_of_turn.tolist()]
    assert pieces == whole
