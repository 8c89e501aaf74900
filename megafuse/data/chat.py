"""The chat template of a model folder: how a conversation becomes text, and what ends the assistant's turn.

Nothing is assumed about the template. What follows the answer is found by rendering a conversation with a known answer
and comparing it with the rendering of its prompt; a template that does not have the form
`prompt + lead + answer + suffix` is refused, because training would then see other text than generation does.
Templates run in transformers' sandbox only; no code of a model folder is ever executed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafuse.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, str]]
_ANSWER = "The answer is 42."
_PAD = "\n \n"
# what Llama 3's templates fall back to: without it, those of 3.2 would write the day of the build into every prompt
_FIXED_DATE = "26 Jul 2024"
# true for every command: those that only score or count have no setting for a template
TEMPLATE_ADVICE = "in the folder, as chat_template.jinja; `build` and `sample` take one as chat_template = PATH too"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path, chat_template: Path | None = None) -> Any:
    """The tokenizer of a Hugging Face folder: local files only, never remote code.

    Raises:
        ConfigError: no such folder, no tokenizer in it, or no chat template there and none given.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"tokenizer: {folder} is not a folder; give a local Hugging Face model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises OSError, ValueError, KeyError and bare Exception here
        if not any((folder / name).exists() for name in _TOKENIZER_FILES):  # what transformers then says is a riddle
            raise ConfigError(
                f"tokenizer: {folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there"
            ) from None
        raise ConfigError(f"tokenizer: {folder} has no loadable tokenizer: {type(e).__name__}: {e}") from e
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"chat_template: {chat_template} is not readable: {e}") from None
    if not tokenizer.chat_template:
        raise ConfigError(f"tokenizer: {folder} has no chat template (a base model?): put one {TEMPLATE_ADVICE}")
    return tokenizer


@dataclass(frozen=True)
class Turn:
    """How the template writes an assistant turn after the generation prompt: `lead + answer + suffix`."""

    lead: str  # white space that the template puts before the answer, "" for most
    suffix: str
    strip_left: bool  # whether the template trims answers
    strip_right: bool

    def trim(self, text: str) -> str:
        """The answer as the template would write it."""
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text


class ChatTemplate:
    """Renders prompts with the template of a tokenizer, and knows the form of its assistant turn.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.
        kwargs: variables for the template, e.g. `{"enable_thinking": False}`.

    Raises:
        ConfigError: the template fails, or does not render a conversation as prompt + lead + answer + suffix.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self.kwargs = dict(kwargs or {})
        if "strftime_now" in self.source and "date_string" in self.source:
            self.kwargs.setdefault("date_string", _FIXED_DATE)
        self.turn = self._probe()

    @property
    def digest(self) -> str:
        """SHA-256 over the source of the template and its variables."""
        return hashlib.sha256(json.dumps([self.source, self.kwargs], sort_keys=True).encode()).hexdigest()

    @property
    def depends_on_date(self) -> bool:
        """Whether the template reads the clock and offers no variable to fix it."""
        return "strftime_now" in self.source and "date_string" not in self.kwargs

    def _render(self, messages: Messages, *, generate: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, **self.kwargs
        )
        assert isinstance(text, str)
        return text

    def prompt(self, messages: Messages) -> str:
        """The text before the answer, generation prompt included.

        Raises:
            DataError: the template refuses the conversation (for example a system message), or would not write an
                answer to it in the form that was found for this template.
        """
        from jinja2 import TemplateError

        try:
            prompt = self._render(messages, generate=True)
            full = self._render([*messages, {"role": "assistant", "content": _ANSWER}], generate=False)
        except (TemplateError, TypeError, ValueError) as e:
            raise DataError(f"the chat template refuses this conversation: {e}") from None
        if full != prompt + self.turn.lead + _ANSWER + self.turn.suffix:
            raise DataError(
                "the chat template writes this conversation differently once it is answered: it ends with "
                f"{full[-80:]!r} instead of {(prompt + self.turn.lead + _ANSWER + self.turn.suffix)[-80:]!r}"
            )
        return prompt

    def _probe(self) -> Turn:
        from jinja2 import TemplateError

        question = [{"role": "user", "content": "What is 6 * 7?"}]
        try:
            prompt = self._render(question, generate=True)
            plain, padded = (
                self._render([*question, {"role": "assistant", "content": text}], generate=False)
                for text in (_ANSWER, _PAD + _ANSWER + _PAD)
            )
        except (TemplateError, TypeError, ValueError) as e:
            raise ConfigError(f"the chat template fails on a user message and an answer: {e}") from None
        if not plain.startswith(prompt):
            raise ConfigError(
                "the chat template does not continue its own prompt: with the generation prompt the conversation ends "
                f"with {prompt[-60:]!r}, with an answer it ends with {plain[-60:]!r}. Put a repaired one "
                f"{TEMPLATE_ADVICE}"
            )
        lead, found, suffix = plain[len(prompt) :].partition(_ANSWER)
        if not found:
            raise ConfigError(f"the chat template changes the text of an answer: {_ANSWER!r} became {plain[-80:]!r}")
        if lead.strip():
            raise ConfigError(
                f"the chat template writes {lead!r} before an answer, which the generation prompt does not hold: "
                "training would differ from generation. Set template_kwargs (of `build`; for example enable_thinking = "
                f"false), or put a repaired one {TEMPLATE_ADVICE}"
            )
        for left in (False, True):
            for right in (False, True):
                answer = ("" if left else _PAD) + _ANSWER + ("" if right else _PAD)
                if padded == prompt + lead + answer + suffix:
                    return Turn(lead, suffix, left, right)
        raise ConfigError(
            f"the chat template changes white space around an answer in an unknown way: {padded[len(prompt) :]!r}"
        )
