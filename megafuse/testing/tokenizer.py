"""A tiny real tokenizer with a ChatML template, built on the spot: tests need no download and no model."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. user assistant system What is the answer to the question?",
    "One prompt has several responses; a reward model scores them, and one smaller model learns from all of them.",
    "def add(a, b):\n    return a + b\n\nThe answer is 42. Because 6 * 7 = 42, and 40 + 2 = 42.",
)


def make_tokenizer(
    path: str | Path,
    vocab_size: int = 512,
    *,
    chat_template: str | None = CHATML,
    bos_token: str | None = None,
    add_bos: bool = False,
) -> Path:
    """Write a tokenizer's files into the folder `path` (made if absent; other files in it stay) and return the folder.

    From 300 entries on it is a byte-level BPE, which encodes any text. Below, one entry a printable ASCII character and
    `<|endoftext|>` for every other: enough for models of 128 entries. The number of entries is exactly `vocab_size`.
    `eos_token` is `<|im_end|>` (id 2), `pad_token` is `<|endoftext|>` (id 0).

    Args:
        path: the folder.
        vocab_size: at least 104.
        chat_template: Jinja source; None leaves the template out.
        bos_token: a token to declare as BOS, e.g. `<|endoftext|>`.
        add_bos: prepend it when text is tokenised with special tokens, as Llama's tokenizer does.
    """
    if vocab_size < 104:
        raise ValueError(f"vocab_size must be >= 104, got {vocab_size}")
    core = _byte_level(vocab_size) if vocab_size >= 300 else _characters(vocab_size)
    if add_bos:
        assert bos_token is not None, "add_bos needs bos_token"
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A",
            pair=f"{bos_token} $A $B",
            special_tokens=[(bos_token, core.token_to_id(bos_token))],
        )
    extra: dict[str, Any] = {"bos_token": bos_token} if bos_token else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        **extra,
    )
    tokenizer.chat_template = chat_template
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level(vocab_size: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    _fill(core, vocab_size)
    return core


def _characters(vocab_size: int) -> Tokenizer:
    letters = ["\n", *(chr(c) for c in range(32, 127))]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIALS))
    _fill(core, vocab_size)
    return core


def _fill(core: Tokenizer, vocab_size: int) -> None:
    """Pad the vocabulary with entries that no text contains, up to exactly `vocab_size`."""
    missing = vocab_size - core.get_vocab_size()
    core.add_special_tokens([f"<|extra_{i}|>" for i in range(missing)])
