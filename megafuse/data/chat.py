"""The chat template of a model folder: how a conversation becomes text, and what ends the assistant's turn.

Nothing is assumed about the template. What follows the answer is found by rendering a conversation with a known answer
and comparing it with the rendering of its prompt; a template that does not have the form
`prompt + lead + answer + suffix` is refused, because training would then see other text than generation does. Each
answer is then written by the template itself, so that whatever it trims is trimmed.
Templates run in transformers' sandbox only, for seconds at most; no code of a model folder is ever executed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megafuse.data.render import Messages, folded, render
from megafuse.errors import ConfigError, DataError

T = TypeVar("T")
QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]
ANSWER = "The answer is 42."
_PAD = "\n \n"
_OTHER_QUESTION = [{"role": "user", "content": "Why so"}]  # ends otherwise: what two prompts end with is the template's
THINK, END_OF_THINKING = "<think>", "</think>"
# what a tokenizer that loses nothing gives back: words, indentation, digits, punctuation
_ROUND_TRIP = "It is far, about 384 thousand km.\n\nSo: 6 * 7 = 42!\n    return x[0] != 'no'\n"
# what Llama 3's templates fall back to: without it, those of 3.2 would write the day of the build into every prompt
_FIXED_DATE = "26 Jul 2024"
# true for every command: those that only score or count have no setting for a template
TEMPLATE_ADVICE = "in the folder, as chat_template.jinja; `build` and `sample` take one as chat_template = PATH too"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(
    folder: Path, chat_template: Path | None = None, *, chats: bool = True, may_lose_text: bool = False
) -> Any:
    """The tokenizer of a Hugging Face folder: local files only, never remote code.

    may_lose_text: take one whose ids do not spell every text, as some reward models were trained with.

    Raises:
        ConfigError: no such folder, no tokenizer in it, one that loses text, or, where it `chats`, no chat template
            there and none given.
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
    tokenizer = _lossless(tokenizer, folder, may_lose_text)
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"chat_template: {chat_template} is not readable: {e}") from None
    if chats and not tokenizer.chat_template:
        raise ConfigError(f"tokenizer: {folder} has no chat template (a base model?): put one {TEMPLATE_ADVICE}")
    return tokenizer


def _lossless(tokenizer: Any, folder: Path, may_lose_text: bool) -> Any:
    """`tokenizer`, or that of tokenizer.json as it stands, where the class of `tokenizer` makes something else of it.

    transformers 5 before 5.22 rebuilds every tokenizer whose class is Llama's, and then a byte-level vocabulary
    (R1-Distill) has no blanks: every answer would be trained in other words, and no loss would tell.

    Raises:
        ConfigError: the ids of neither spell the text, and none `may_lose_text`.
    """
    from transformers import PreTrainedTokenizerFast

    text = _there_and_back(tokenizer)
    if text == _ROUND_TRIP:
        return tokenizer
    if (folder / "tokenizer.json").is_file():
        plain = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        if _there_and_back(plain) == _ROUND_TRIP:
            return plain
    if may_lose_text:
        return tokenizer
    raise ConfigError(
        f"tokenizer: {folder} loses text: {_ROUND_TRIP!r} comes back from its ids as {text!r}. Update transformers and "
        f"tokenizers, or repair the files: the class is {type(tokenizer).__name__}"
    )


def _there_and_back(tokenizer: Any) -> str:
    """_ROUND_TRIP to ids and back. Tokenizers of the SentencePiece kind may put one blank before it."""
    ids = tokenizer(_ROUND_TRIP, add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removeprefix(" ")


@dataclass(frozen=True)
class Turn:
    """How the template writes an assistant turn: `opening` ends every prompt, then come `lead + answer + suffix`."""

    opening: str  # of the generation prompt, what does not depend on the conversation
    lead: str  # white space that the template puts before the answer, "" for most
    suffix: str


class ChatTemplate:
    """Renders prompts and answers with the template of a tokenizer, and knows the form of its assistant turn.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.
        kwargs: variables for the template, e.g. `{"enable_thinking": False}`.
        thinking_in_answers: answers hold their think block, and go behind the prompt as they are.
        fold_system: a system message becomes the beginning of the first user message.

    Raises:
        ConfigError: the template fails, or does not render a conversation as prompt + lead + answer + suffix.
    """

    def __init__(
        self,
        tokenizer: Any,
        kwargs: Mapping[str, Any] | None = None,
        *,
        thinking_in_answers: bool = False,
        fold_system: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self.thinking_in_answers, self._fold = thinking_in_answers, fold_system
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as e:  # several templates with names, and none of them is `default`
            raise ConfigError(f"chat template: {str(e).rstrip('.')}. Put the one to use {TEMPLATE_ADVICE}") from None
        self.kwargs = dict(kwargs or {})
        if "strftime_now" in self.source and "date_string" in self.source:
            self.kwargs.setdefault("date_string", _FIXED_DATE)
        self._head = _probed(lambda: self._render(QUESTION, generate=True))
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
        return render(self._tokenizer, messages, generate=generate, kwargs=self.kwargs)

    def prompt(self, messages: Messages) -> str:
        """The text before the answer, generation prompt included.

        Only what follows the conversation has to be as it was found for this template: some write the history of an
        answered conversation otherwise (Mistral's put a system message into the last user turn, if that is the last),
        and what generation sees is the prompt.

        Raises:
            DataError: the template refuses the conversation (for example a system message), or would not write an
                answer to it in the form that was found for this template.
        """
        messages = folded(messages) if self._fold else messages
        prompt = self._render(messages, generate=True)
        turn, told = self.turn, prompt
        wanted = turn.opening
        if prompt.endswith(wanted) and not self.thinking_in_answers:
            told = self._render([*messages, _assistant(ANSWER)], generate=False)
            wanted += turn.lead + ANSWER + turn.suffix
        if not told.endswith(wanted):
            raise DataError(
                "the chat template writes this conversation differently"
                f"{' once it is answered' if told is not prompt else ''}: it ends with {told[-80:]!r} instead of "
                f"{wanted[-80:]!r}"
            )
        return prompt

    def answer(self, text: str) -> str | None:
        """What stands between a prompt and the suffix for this answer, lead included; "" where nothing is left of it.

        None where there is no such text: the template would not write it behind its prompt, or, where answers hold
        their think blocks, this one has none.
        """
        if self.thinking_in_answers:
            return self._thought(text)
        try:
            whole = self._render([*QUESTION, _assistant(text)], generate=False)
        except DataError:
            return None
        end = len(whole) - len(self.turn.suffix)
        if not whole.startswith(self._head) or not whole.endswith(self.turn.suffix) or end < len(self._head):
            return None
        written = whole[len(self._head) : end]
        return written if written.strip() else ""

    def _thought(self, text: str) -> str | None:
        """The answer with its think block, which is opened once, by the prompt or by the answer."""
        if END_OF_THINKING not in text:
            return None
        bare = text.lstrip()
        _, opened, blank = self.turn.opening.rpartition(THINK)
        if bare.startswith(THINK):
            return bare.removeprefix(THINK).removeprefix(blank) if opened else bare
        return text if opened else f"{THINK}\n{text}"

    def _probe(self) -> Turn:
        plain, other = (
            _probed(lambda: self._render([*QUESTION, _assistant(ANSWER)], generate=False)),
            _probed(lambda: self._render(_OTHER_QUESTION, generate=True)),
        )
        opening = _common_end(self._head, other)
        if self.thinking_in_answers:
            if END_OF_THINKING in opening:
                raise ConfigError(
                    f'thinking = "in_answers", but the template closes the think block of every prompt: {opening!r}. '
                    "Leave enable_thinking = false out of template_kwargs, or leave out thinking"
                )
            _, found, suffix = plain.rpartition(ANSWER)
            if not found:
                raise ConfigError(f"the chat template changes the text of an answer: {ANSWER!r} became {plain[-80:]!r}")
            return Turn(opening, "", suffix)
        if not plain.startswith(self._head):
            raise ConfigError(
                "the chat template does not continue its own prompt: with the generation prompt the conversation ends "
                f"with {self._head[-60:]!r}, with an answer it ends with {plain[-60:]!r}. {self._way_in()}"
            )
        lead, found, suffix = plain[len(self._head) :].partition(ANSWER)
        if not found:
            raise ConfigError(f"the chat template changes the text of an answer: {ANSWER!r} became {plain[-80:]!r}")
        if lead.strip():
            raise ConfigError(
                f"the chat template writes {lead!r} before an answer, which the generation prompt does not hold: "
                f"training would differ from generation. {self._way_in()}"
            )
        self.turn = Turn(opening, lead, suffix)
        padded = _probed(lambda: self.answer(_PAD + ANSWER + _PAD))
        if not padded or padded.strip() != ANSWER or padded.removeprefix(lead) not in _PAD + ANSWER + _PAD:
            raise ConfigError(
                f"the chat template changes white space around an answer in an unknown way: "
                f"{_PAD + ANSWER + _PAD!r} became {padded!r}"
            )
        return self.turn

    def _way_in(self) -> str:
        """What to do about a template that does not write an answer behind its prompt."""
        repaired = f"put a repaired one {TEMPLATE_ADVICE}"
        if THINK not in self.source:
            return f"Set template_kwargs of `build` where the template has a variable for it, or {repaired}"
        return (
            "For a target that is not to think, set template_kwargs of `build` (enable_thinking = false for Qwen 3); "
            'for one that thinks, thinking = "in_answers", with answers that hold their think blocks. Or '
            f"{repaired}"
        )


def _common_end(one: str, other: str) -> str:
    differs = (i for i, (a, b) in enumerate(zip(reversed(one), reversed(other))) if a != b)
    return one[len(one) - next(differs, min(len(one), len(other))) :]


def lead_of(tokenizer: Any) -> str:
    """White space that the template writes before an answer, so that it is none of the answer's: Mistral's blank, with
    which vLLM gives back what was generated. "" where the template has none, or another form."""
    try:
        return ChatTemplate(tokenizer).turn.lead
    except ConfigError:
        return ""


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _probed(act: Callable[[], T]) -> T:
    try:
        return act()
    except DataError as e:
        why = str(e).partition(": ")[2]
        raise ConfigError(f"the chat template fails on a user message and an answer: {why}") from None
