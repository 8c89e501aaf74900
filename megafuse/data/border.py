"""The border between a prompt and an answer: the ids of an answer as a piece of the conversation.

What a text has by itself is not always what it has behind a prompt: tokenizers of the SentencePiece kind put a blank
before every text, and a template may write a blank before the end of turn, which melts into one at the answer's end.
So an answer is encoded between the last words of the prompt and the end of turn, and what those words have is cut
off. Where its first characters would melt into the prompt's last token (a line break behind a line break), it is
encoded behind other words: when generation starts, the prompt's tokens are given.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from megafuse.data.chat import ANSWER, Turn
from megafuse.errors import ConfigError

# Of these there is one for every text that the text does not melt into.
_APART = ("a", "1", ".", "\n")


class Encode(Protocol):
    """Text to ids."""

    def __call__(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        """Ids of each text, nothing added; `control`: whether control tokens written out in it become such tokens."""


class Border:
    """Encodes answers for one tokenizer and template.

    Args:
        encode: text to ids.
        turn: how the template writes an assistant turn.
        control: text of each control token, that of the end of a sequence among them.
        written_out: finds control tokens that are written out in a text.
        end_of_turn: text of the end of turn, instead of what the template writes.

    Raises:
        ConfigError: nothing ends a turn.
    """

    def __init__(
        self,
        encode: Encode,
        turn: Turn,
        control: Mapping[int, str],
        written_out: re.Pattern[str] | None,
        *,
        end_of_turn: str | None = None,
    ) -> None:
        self._encode, self._written_out = encode, written_out
        # Behind nothing at all, a tokenizer of the SentencePiece kind would put its blank.
        self._behind: dict[bool, tuple[str, ...]] = {True: (*filter(None, (turn.opening,)), *_APART)}
        self._end, self.ending = turn.suffix if end_of_turn is None else end_of_turn, []
        self._words, self._stop = self._end, []  # of the end: what comes before its first control token, and the rest
        plain = turn.lead + ANSWER
        body, whole = self._after([plain, plain + self._end], control=True)
        stop = next((n for n, token_id in enumerate(whole) if token_id in control), None)
        if stop is not None:
            text = control[whole[stop]]
            self._words = self._end[: self._end.find(text)]
            if end_of_turn is None:
                # generation stops there: the newline that ChatML puts after `<|im_end|>` is never predicted
                self._end, whole = self._words + text, whole[: stop + 1]
            self._stop = whole[stop:]
        if whole[: len(body)] == body:
            self.ending = whole[len(body) :]
        else:  # melted: Qwen has one token for the full stop of the answer and a line break
            (self.ending,) = self._after([self._end], control=True)
        if not self.ending:
            eos = ["</s>", *control.values()][-1]
            raise ConfigError(
                "the chat template writes nothing after an answer, so a model could not learn to stop: set "
                f'end_of_turn, for example end_of_turn = "{eos}"'
            )
        # Where control tokens are spelled out, so would be that of the opening. What follows it may have the tokens
        # that begin a text (Mistral 0.3): then nothing stands for it.
        self._behind[False] = ("", *_APART) if self._encode([plain], control=False) == [body] else _APART

    def __call__(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(ids without, ids with the end of turn) of each answer, lead included. [R]."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for control in (True, False):
            mine = [i for i, text in enumerate(texts) if self._spells_out(text) is not control]
            given = [texts[i] for i in mine]
            end, stop = (self._end, []) if control else (self._words, self._stop)
            ending = self.ending[: len(self.ending) - len(stop)]
            wholes = self._after([text + end for text in given], control=control)
            # elsewhere the first words of the ending have melted into the answer's last
            apart = [ids[len(ids) - len(ending) :] == ending for ids in wholes]
            again = iter(self._after([text for text, is_apart in zip(given, apart) if not is_apart], control=control))
            bodies = [
                ids[: len(ids) - len(ending)] if is_apart else next(again) for ids, is_apart in zip(wholes, apart)
            ]
            found |= {i: (body, [*whole, *stop]) for i, body, whole in zip(mine, bodies, wholes)}
        return [found[i] for i in range(len(texts))]

    def _spells_out(self, text: str) -> bool:
        return self._written_out is not None and self._written_out.search(text) is not None

    def _after(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        """Ids of each text behind the opening, or behind other words where it would melt into that."""
        found: dict[int, list[int]] = {}
        for before in (*self._behind[control], ""):
            left = [i for i in range(len(texts)) if i not in found]
            if not left:
                break
            start, *wholes = self._encode([before, *(before + texts[i] for i in left)], control=control)
            found |= {i: ids[len(start) :] for i, ids in zip(left, wholes) if ids[: len(start)] == start}
        return [found[i] for i in range(len(texts))]
