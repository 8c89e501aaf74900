"""Text to token ids: prompts once through the chat template, answers as they stand behind a prompt.

The prompt is rendered to text and tokenised without special tokens being added: BOS comes from the template or not at
all, as in vLLM's chat endpoint. An answer is tokenised apart from its prompt, because generation starts at that same
boundary, but as a piece of the conversation (`data.border`); control tokens written out in an answer's text (`<s>` in
HTML, a stray `<|im_end|>`) are ordinary text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.data.border import Border
from megafuse.data.chat import ANSWER, END_OF_THINKING, TEMPLATE_ADVICE, THINK, ChatTemplate, load_tokenizer
from megafuse.data.render import Messages
from megafuse.errors import ConfigError, DataError

_VOCABULARY_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def vocabulary_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the vocabulary files in the folder; "" where it has none."""
    h, found = hashlib.sha256(), False
    for file in (folder / name for name in _VOCABULARY_FILES):
        if file.is_file():
            data, found = file.read_bytes(), True
            h.update(f"{file.name}:{len(data)}:".encode() + data)
    return h.hexdigest() if found else ""


@dataclass(frozen=True)
class Answer:
    """An answer in ids, without and with the end of turn; or why it has none."""

    body: np.ndarray  # [T] int32
    whole: np.ndarray  # [T + E] int32; [0] where the answer has no tokens
    dropped: str = ""  # the reason: template_refuses_it, no_thinking, no_token
    notes: tuple[str, ...] = ()  # what to count: see ChatTokenizer._answer


_NONE = np.zeros(0, np.int32)


class ChatTokenizer:
    """Turns conversations and answers into token ids for one model folder.

    Args:
        folder: Hugging Face folder with the tokenizer, and `config.json` where there is one.
        chat_template: a Jinja file that replaces the folder's template.
        template_kwargs: variables for the template.
        end_of_turn: text of the end of the assistant's turn, instead of what the template writes.
        thinking_in_answers, fold_system: see `ChatTemplate`.
        vocab_size: entries of the model's embedding; default: `vocab_size` of the folder's config.json.

    Raises:
        ConfigError: nothing loadable, no or no usable template, no end of turn, no vocabulary size.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        chat_template: Path | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        end_of_turn: str | None = None,
        vocab_size: int | None = None,
        thinking_in_answers: bool = False,
        fold_system: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._tokenizer = load_tokenizer(self.folder, chat_template)
        self.template = ChatTemplate(
            self._tokenizer, template_kwargs, thinking_in_answers=thinking_in_answers, fold_system=fold_system
        )
        self._missing = "no_thinking" if thinking_in_answers else "template_refuses_it"
        self.vocab_size = vocab_size if vocab_size is not None else _model_vocab_size(self.folder)
        added = self._tokenizer.added_tokens_decoder
        self._control = {i: t.content for i, t in added.items() if t.special}
        # some have control tokens for the think block (Phi 4 reasoning): in answers that hold it they are tokens
        block = (THINK, END_OF_THINKING) if thinking_in_answers else ()
        written_out = "|".join(re.escape(text) for text in self._control.values() if text not in block)
        self._control_text = re.compile(written_out) if written_out else None
        eos = self._tokenizer.eos_token
        end = {} if eos is None else {self._tokenizer.eos_token_id: eos}  # the last one: what a message names
        self._border = Border(
            self._encode,
            self.template.turn,
            {**{i: text for i, text in self._control.items() if text != eos}, **end},
            self._control_text,
            end_of_turn=end_of_turn,
        )
        self.end_of_turn = self._checked(self._border.ending, "the end of turn")

    @property
    def digest(self) -> str:
        """See `vocabulary_digest`."""
        return vocabulary_digest(self.folder)

    @property
    def template_digest(self) -> str:
        """SHA-256 over the template, its variables, the end-of-turn ids, and those of an answer where versions before
        `data.border` began or ended it otherwise: data sets from before are told apart where they differ."""
        plain, end = self.template.turn.lead + ANSWER, self.end_of_turn.tolist()
        ((body, whole),) = self._border([plain])
        changed = "" if body in self._encode([ANSWER, plain], control=False) else f":{body}"
        changed += "" if whole == [*body, *end] else f":{whole}"
        return hashlib.sha256(f"{self.template.digest}:{end}{changed}".encode()).hexdigest()

    def _encode(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        """Ids of each text; `control`: whether control tokens written out in it become control tokens."""
        return _encode(self._tokenizer, texts, control=control)

    def _checked(self, ids: Sequence[int], what: str) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and array.max() >= self.vocab_size:
            raise ConfigError(
                f"{what} has token id {array.max()}, but the model's vocab_size is {self.vocab_size}: the tokenizer in "
                f"{self.folder} belongs to another model"
            )
        return array.astype(np.int32)

    def prompts(self, conversations: Sequence[Messages]) -> list[np.ndarray | DataError]:
        """Ids of each conversation up to the place where the answer starts, or why it has none. [P] int32 each.

        Raises:
            ConfigError: a token id is outside the model's vocabulary, or the prompt starts with two BOS tokens.
        """
        texts: list[str | DataError] = []
        for messages in conversations:
            try:
                texts.append(self.template.prompt(messages))
            except DataError as e:
                texts.append(e)
        encoded = iter(self._encode([t for t in texts if isinstance(t, str)], control=True))
        return [self._prompt(next(encoded)) if isinstance(t, str) else t for t in texts]

    def _prompt(self, ids: list[int]) -> np.ndarray:
        bos = self._tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise ConfigError(
                f"a prompt starts with two BOS tokens ({self._tokenizer.bos_token!r}, id {bos}): the chat template "
                f"writes it and the tokenizer (or the prompt's text) has it too. Put a repaired one {TEMPLATE_ADVICE}"
            )
        return self._checked(ids, "a prompt")

    def answers(self, texts: Sequence[str]) -> list[Answer]:
        """Ids of each answer as it stands between a prompt and the end of turn. [R].

        Raises:
            ConfigError: a token id is outside the model's vocabulary.
        """
        written = [self.template.answer(text) for text in texts]
        found = iter(self._border([text for text in written if text]))
        return [self._answer(text, own, *(next(found) if own else ((), ()))) for text, own in zip(texts, written)]

    def _answer(self, text: str, written: str | None, body: Sequence[int], whole: Sequence[int]) -> Answer:
        """written: what the template makes of `text`; body, whole: its ids without and with the end of turn."""
        if not body:  # white space that the template trims, or that the tokenizer does not know
            return Answer(_NONE, _NONE, self._missing if written is None else "no_token")
        assert written is not None
        facts = {
            "white_space_in_front": written.removeprefix(self.template.turn.lead)[:1].isspace(),
            "control_tokens_in_their_text": self.has_control_text(text),
            "unknown_tokens": self._tokenizer.unk_token_id in body,
            "text_left_out": not self.template.thinking_in_answers and text.strip() not in written,
        }
        notes = tuple(name for name, holds in facts.items() if holds)
        return Answer(self._checked(body, "an answer"), self._checked(whole, "an answer"), notes=notes)

    def has_control_text(self, text: str) -> bool:
        """Whether a control token of this tokenizer is written out in the text."""
        return self._control_text is not None and self._control_text.search(text) is not None


def _encode(tokenizer: Any, texts: Sequence[str], *, control: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not control,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def token_counter(folder: Path) -> Callable[[Sequence[str]], list[int]]:
    """Tokens of each text, nothing added, by the tokenizer of a folder: for statistics, whatever its template is.

    Raises:
        ConfigError: no such folder, no tokenizer in it, or one that loses text.
    """
    tokenizer = load_tokenizer(folder, chats=False)
    return lambda texts: [len(ids) for ids in _encode(tokenizer, texts, control=False)]


def _model_vocab_size(folder: Path) -> int:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{folder} has no config.json: set vocab_size to the model's number of embeddings") from None
    except ValueError as e:
        raise ConfigError(f"{file} is not JSON: {e}") from None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"{file} has no usable vocab_size ({size!r}): set vocab_size")
    return size
