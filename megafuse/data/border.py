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
        ends = [(turn.opening.rfind(text), text) for text in control.values() if text in turn.opening]
        at, token = max(ends, default=(0, ""))
        opening = turn.opening[at:]
        self._behind: dict[bool, tuple[str, ...]] = {True: (opening, *_APART)}
        self._end, self.ending = "", []
        plain = turn.lead + ANSWER
        if end := turn.suffix if end_of_turn is None else end_of_turn:
            body, whole = self._after([plain, plain + end], control=True)
            stop = next((n for n, token_id in enumerate(whole) if token_id in control), None)
            if end_of_turn is None and stop is not None:
                # generation stops there: the newline that ChatML puts after `<|im_end|>` is never predicted
                end = end[: end.find(control[whole[stop]])] + control[whole[stop]]
                whole = whole[: stop + 1]
            same = next((n for n, (a, b) in enumerate(zip(body, whole)) if a != b), len(body))
            self._end, self.ending = end, whole[same:]
        if not self.ending:
            eos = ["</s>", *control.values()][-1]
            raise ConfigError(
                "the chat template writes nothing after an answer, so a model could not learn to stop: set "
                f'end_of_turn, for example end_of_turn = "{eos}"'
            )
        # Where control tokens are spelled out, so is the one of the opening: what can stand for it?
        stand_ins = (opening, opening.removeprefix(token), "")
        self._behind[False] = (
            *(text for text in stand_ins if self._spelled(text, plain) == body),
            *_APART,
        )

    def _spelled(self, before: str, text: str) -> list[int] | None:
        """Ids of `text` behind `before`, control tokens spelled out; None where it melts into it."""
        start, whole = self._encode([before, before + text], control=False)
        return whole[len(start) :] if whole[: len(start)] == start else None

    def __call__(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(ids without, ids with the end of turn) of each answer, lead included. [R]."""
        spelled = [self._written_out is not None and bool(self._written_out.search(text)) for text in texts]
        plain = [text for text, is_spelled in zip(texts, spelled) if not is_spelled]
        wholes = self._after([text + self._end for text in plain], control=True)
        if len(self.ending) == 1:
            bodies = iter([ids[:-1] for ids in wholes])
        else:  # its first words may have melted into the answer's last
            bodies = iter(self._after(plain, control=True))
        others = iter(self._after([text for text, is_spelled in zip(texts, spelled) if is_spelled], control=False))
        found, ended = [], iter(wholes)
        for is_spelled in spelled:
            body = next(others) if is_spelled else next(bodies)
            found.append((body, [*body, *self.ending] if is_spelled else next(ended)))
        return found

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
