"""Tokenizers and chat templates of the families that fusion meets, made anew: the same rules, small vocabularies.

The rules are those of the published `tokenizer.json` and `chat_template` files: normaliser, pre-tokeniser, what is
prepended where, which words are control tokens, and what the template writes around an answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_BLANK = "\u2581"
_CORPUS = (
    "The answer is 42. Because 6 * 7 = 42, and 40 + 2 = 42. It's what we'd say: they're right, aren't they?\n\n",
    "def add(a, b):\n    if a:\n        return a + b\n\n\n# 384 thousand km, 1234567 m\n",
    "user assistant system model What is the answer? Hello, hello. Word by word: wordy words, the words of it.\n",
    "<think>\nOne and two are three.\n</think>\n\nIt is 3.\n",
    "\u65e5\u672c\u8a9e\u3067\u7b54\u3048\u308b\u3002\u7b54\u6848\u662f\u4e09\u3002 caf\u00e9 \U0001f642\n",
    "1. one\n2. two\n\n- a\n- b  \n  c   d    e\n \n",
)
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama3": Regex(_LETTERS + r"|\p{N}{1,3}" + _REST),
    "qwen": Regex(_LETTERS + r"|\p{N}" + _REST),
    "tekken": Regex(_TEKKEN),
}


def _byte_level(kind: str) -> Tokenizer:
    """Llama 3 and what is built on it, Qwen 2 to 3, Tekken (Nemo), SmolLM2."""
    core = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    core.normalizer = normalizers.NFC() if kind == "qwen" else None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    first = pre_tokenizers.Digits(True) if kind == "smollm2" else pre_tokenizers.Split(_SPLITS[kind], "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_CORPUS * 3, trainer)
    return core


def _sentencepiece(kind: str) -> Tokenizer:
    """Llama 2 and Mistral (`llama`: a blank before every section, `metaspace`: before a text), Gemma (no blank)."""
    newlines = kind == "gemma"  # the others spell them as bytes
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_BLANK}*[^{_BLANK}\n]+|{_BLANK}+|\n+"), "isolated")
    texts = [text.replace(" ", _BLANK) for text in _CORPUS * 3]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator(texts if newlines else [t.replace("\n", "") for t in texts], trainer)
    learned = json.loads(core.to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", _BLANK)
    end = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        core.normalizer = blanks
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "llama":
        core.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), blanks])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(end if kind == "gemma" else [*end, decoders.Strip(" ", 1, 0)])
    return core


@dataclass(frozen=True)
class ChatFamily:
    """One published combination of tokenizer and template.

    Attributes:
        kind: of tokenizer: llama3, qwen, tekken, smollm2 (bytes); llama, metaspace, gemma (SentencePiece).
        template: Jinja source.
        end: what ends an answer.
        control: the other control tokens.
        words: added tokens that are not control tokens.
        cls: tokenizer_class of tokenizer_config.json.
        bos: the template's bos_token, among `control`.
        kwargs: variables that the template needs.
        build: settings of `megafuse build`.
    """

    kind: str
    template: str
    end: str
    control: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    cls: str = "PreTrainedTokenizerFast"
    bos: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    thinking_in_answers: bool = False
    fold_system: bool = False

    def write(self, folder: Path) -> Path:
        """Write the tokenizer's files and a config.json with the vocabulary's size."""
        byte_level = self.kind in ("llama3", "qwen", "tekken", "smollm2")
        core = _byte_level(self.kind) if byte_level else _sentencepiece(self.kind)
        special = dict.fromkeys([*([self.bos] if self.bos else []), *self.control, self.end])
        core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        core.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.words])
        folder.mkdir(parents=True, exist_ok=True)
        core.save(str(folder / "tokenizer.json"))
        facts = {
            "tokenizer_class": self.cls,
            "eos_token": self.end,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.template,
            **({"bos_token": self.bos} if self.bos else {}),
            **({} if byte_level else {"unk_token": "<unk>"}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps({"vocab_size": core.get_vocab_size()}), encoding="utf-8")
        return folder


def _turns(prompt: str, answer: str, generate: str = "", before: str = "") -> str:
    """A template that writes `prompt` for every message that is not an answer."""
    return (
        before + "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}" + prompt
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + generate + "{% endif %}"
    )  # fmt: skip


_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_IM = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = _turns(_IM, _IM, "<|im_start|>assistant\n")
_HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
LLAMA3 = _turns(_HEADER, _HEADER, "<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ bos_token }}")
TULU3 = _turns(
    "<|{{ m.role }}|>\n{{ m.content }}\n",
    "<|assistant|>\n{{ m.content }}{{ eos_token }}{% if not loop.last %}\n{% endif %}",
    "<|assistant|>\n",
)
_IM3 = "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
QWEN3 = _turns(
    _IM,
    "{% if not loop.last %}" + _IM + "{% elif '</think>' in m.content %}{% set parts = m.content.split('</think>') %}"
    "{{ '<|im_start|>assistant\n<think>\n' + parts[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' "
    "+ parts[-1].lstrip('\n') + '<|im_end|>\n' }}{% else %}" + _IM3 + "{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
_R1_BOS, _R1_EOS, _R1_USER, _R1_ANSWER = (
    f"<\uff5c{name}\uff5c>"
    for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
)
R1 = _turns(
    "{% if m.role == 'user' %}" + _R1_USER + "{% endif %}{{ m.content }}",
    _R1_ANSWER + "{{ m.content.split('</think>')[-1] }}" + _R1_EOS,
    _R1_ANSWER + "<think>\n",
    "{{ bos_token }}",
)
_ROLE = "{% set role = 'model' if m.role == 'assistant' else m.role %}"
_GEMMA = _ROLE + "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n"
GEMMA2 = _turns(
    _GEMMA,
    _GEMMA,
    "<start_of_turn>model\n",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
)
_SYS = "'<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n'"
LLAMA2 = (
    "{% set sys = " + _SYS + " if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if sys else messages) %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _mistral(user: str, answer: str) -> str:
    """Mistral's: a system message stands in the last turn, if that is the user's."""
    return (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{% set text = (sys if loop.last else '') + m.content %}"
        "{{ " + user + " }}{% else %}{{ " + answer + " }}{% endif %}{% endfor %}"
    )  # fmt: skip


_ZEPHYR = "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
ZEPHYR = _turns(_ZEPHYR, _ZEPHYR, "<|assistant|>\n")
_IM_TOKENS: dict[str, Any] = {"end": "<|im_end|>", "control": ("<|endoftext|>", "<|im_start|>")}
_THINK_WORDS = ("<think>", "</think>")
_L3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_SP: dict[str, Any] = {"end": "</s>", "bos": "<s>"}
_R1: dict[str, Any] = {"end": _R1_EOS, "bos": _R1_BOS, "control": (_R1_USER, _R1_ANSWER), "cls": "LlamaTokenizerFast"}
_INST: dict[str, Any] = {"control": ("[INST]", "[/INST]")}

CHAT_FAMILIES: dict[str, ChatFamily] = {
    "llama_2": ChatFamily("llama", LLAMA2, cls="LlamaTokenizer", **_SP),
    "llama_2_fast": ChatFamily("llama", LLAMA2, **_SP),
    "llama_3": ChatFamily("llama3", LLAMA3, "<|eot_id|>", _L3, bos="<|begin_of_text|>"),
    "tulu_3": ChatFamily("llama3", TULU3, "<|end_of_text|>", _L3[:1], bos="<|begin_of_text|>"),
    "qwen_2.5": ChatFamily("qwen", _DEFAULT_SYSTEM + CHATML, cls="Qwen2Tokenizer", **_IM_TOKENS),
    "qwen_3_answers": ChatFamily("qwen", QWEN3, words=_THINK_WORDS, kwargs={"enable_thinking": False}, **_IM_TOKENS),
    "qwen_3_thinks": ChatFamily("qwen", QWEN3, words=_THINK_WORDS, thinking_in_answers=True, **_IM_TOKENS),
    "qwen_3_2507": ChatFamily("qwen", CHATML, words=_THINK_WORDS, cls="Qwen2Tokenizer", **_IM_TOKENS),
    "r1_distill_llama": ChatFamily("llama3", R1, words=_THINK_WORDS, thinking_in_answers=True, **_R1),
    "r1_distill_qwen": ChatFamily("qwen", R1, words=_THINK_WORDS, thinking_in_answers=True, **_R1),
    "r1_without_think": ChatFamily("qwen", R1.replace("<think>\n", ""), words=_THINK_WORDS, **_R1),
    "smollm_2": ChatFamily("smollm2", _DEFAULT_SYSTEM + CHATML, cls="GPT2Tokenizer", **_IM_TOKENS),
    "mistral_0.1_older": ChatFamily(
        "llama", _mistral("'[INST] ' + text + ' [/INST]'", "m.content + eos_token + ' '"), cls="LlamaTokenizer", **_SP
    ),
    "mistral_0.2": ChatFamily(
        "llama", _mistral("'[INST] ' + text + ' [/INST]'", "' ' + m.content + eos_token"), **_SP
    ),
    "mistral_0.3": ChatFamily(
        "metaspace", _mistral("'[INST] ' + text + '[/INST]'", "' ' + (m.content | trim) + eos_token"), **_SP, **_INST
    ),
    "mistral_0.3_prepends": ChatFamily(
        "llama", _mistral("'[INST] ' + text + '[/INST]'", "' ' + (m.content | trim) + eos_token"), **_SP, **_INST
    ),
    "mistral_nemo": ChatFamily(
        "tekken", _mistral("'[INST]' + text + '[/INST]'", "(m.content | trim) + eos_token"), **_SP, **_INST
    ),
    "mixtral_8x22b": ChatFamily(
        "llama", _mistral("'[INST] ' + text + ' [/INST]'", "' ' + m.content + ' ' + eos_token"), **_SP
    ),
    "gemma_2": ChatFamily(
        "gemma", GEMMA2, "<end_of_turn>", ("<eos>", "<start_of_turn>"), bos="<bos>", fold_system=True
    ),
    "gemma_2_class": ChatFamily(
        "gemma", GEMMA2, "<end_of_turn>", ("<eos>", "<start_of_turn>"), bos="<bos>", cls="GemmaTokenizer"
    ),
    "zephyr": ChatFamily("llama", ZEPHYR, cls="LlamaTokenizer", **_SP),
    "tinyllama": ChatFamily("llama", ZEPHYR, **_SP),
    "chatml_on_llama_2": ChatFamily("llama", CHATML, "<|im_end|>", ("<|im_start|>", "</s>"), bos="<s>"),
    "yi": ChatFamily("metaspace", CHATML, cls="LlamaTokenizer", **_IM_TOKENS),
}  # fmt: skip
