"""Text to token ids: prompts once through the chat template, answers as their text plus the end-of-turn tokens.

The prompt is rendered to text and tokenised without special tokens being added: BOS comes from the template or not at
all, as in vLLM's chat endpoint. An answer is tokenised apart from its prompt, because generation starts at that same
boundary; control tokens written out in an answer's text (`<s>` in HTML, a stray `<|im_end|>`) are ordinary text.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.data.chat import TEMPLATE_ADVICE, ChatTemplate, Messages, load_tokenizer
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


class ChatTokenizer:
    """Turns conversations and answers into token ids for one model folder.

    Args:
        folder: Hugging Face folder with the tokenizer, and `config.json` where there is one.
        chat_template: a Jinja file that replaces the folder's template.
        template_kwargs: variables for the template.
        end_of_turn: text of the end of the assistant's turn, instead of what the template writes.
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
    ) -> None:
        self.folder = Path(folder)
        self._tokenizer = load_tokenizer(self.folder, chat_template)
        self.template = ChatTemplate(self._tokenizer, template_kwargs)
        self.vocab_size = vocab_size if vocab_size is not None else _model_vocab_size(self.folder)
        added = self._tokenizer.added_tokens_decoder
        self._control = {i: t.content for i, t in added.items() if t.special}
        written_out = "|".join(map(re.escape, self._control.values()))
        self._control_text = re.compile(written_out) if written_out else None
        self.end_of_turn = self._end_of_turn(end_of_turn)
        self._lead = self._boundary()

    @property
    def digest(self) -> str:
        """SHA-256 over the names and bytes of the vocabulary files in the folder."""
        h = hashlib.sha256()
        for name in _VOCABULARY_FILES:
            file = self.folder / name
            if file.is_file():
                data = file.read_bytes()
                h.update(f"{name}:{len(data)}:".encode() + data)
        return h.hexdigest()

    @property
    def template_digest(self) -> str:
        """SHA-256 over the template, its variables and the end-of-turn ids."""
        return hashlib.sha256(f"{self.template.digest}:{self.end_of_turn.tolist()}".encode()).hexdigest()

    def _encode(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        """Ids of each text; `control`: whether control tokens written out in it become control tokens."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not control,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def _end_of_turn(self, override: str | None) -> np.ndarray:
        """The ids that end an answer. [E] int32, E >= 1.

        Of what the template writes after an answer, everything up to its first control token: that is where
        generation stops, so that the newline ChatML puts after `<|im_end|>` is never predicted.
        """
        text = override if override is not None else self.template.turn.suffix
        ids = self._encode([text], control=True)[0] if text else []
        if not ids:
            raise ConfigError(
                "the chat template writes nothing after an answer, so a model could not learn to stop: set "
                f'end_of_turn, for example end_of_turn = "{self._tokenizer.eos_token or "</s>"}"'
            )
        if override is None:
            stops = {*self._control, self._tokenizer.eos_token_id}
            first = next((n for n, token in enumerate(ids) if token in stops), len(ids) - 1)
            ids = ids[: first + 1]
        return self._checked(ids, "the end of turn")

    def _boundary(self) -> str:
        """What to put before an answer so that it gets the tokens that it has after a prompt.

        Most templates put nothing there. Where one writes a blank (Mistral), tokenizers that mark words by a leading
        blank need it, those of the SentencePiece kind add it themselves.
        """
        lead = self.template.turn.lead
        if not lead:
            return ""
        prompt = self.template.prompt([{"role": "user", "content": "What is 6 * 7?"}])
        before, whole, bare = self._encode([prompt, f"{prompt}{lead}Because so.", "Because so."], control=True)
        return "" if whole == before + bare else lead

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

    def answers(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each answer's text WITHOUT the end of turn. [R] int32 each.

        Raises:
            ConfigError: a token id is outside the model's vocabulary.
        """
        trim = self.template.turn.trim
        encoded = self._encode([self._lead + trim(text) for text in texts], control=False)
        return [self._checked(ids, "an answer") for ids in encoded]

    def has_control_text(self, text: str) -> bool:
        """Whether a control token of this tokenizer is written out in the text."""
        return self._control_text is not None and self._control_text.search(text) is not None

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, nothing added: for statistics."""
        return [len(ids) for ids in self._encode(texts, control=False)]


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
