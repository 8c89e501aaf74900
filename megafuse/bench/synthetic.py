"""Groups of random tokens with given lengths: what `RowPlanner` and `build_row` need of a data set."""

from collections.abc import Sequence

import numpy as np

from megafuse.bench.lengths import PromptLengths
from megafuse.data.types import Group


class SyntheticGroups:
    """Groups with the lengths of `prompts`, all of which have `sources` sources, and the terms of a loss's kind.

    Stands for a `GroupDataset`: `len()`, `[i]`, and the lengths. Tokens depend on the seed and the group's number only,
    so that every rank, and every way to put the group into rows, has the same.
    """

    def __init__(
        self, prompts: Sequence[PromptLengths], sources: int, *, kind: str, vocab_size: int, seed: int
    ) -> None:
        self.vocab_size, self._seed = vocab_size, seed
        each = len(prompts[0].sources[0])
        kept, self._members = group_terms(kind, sources, each)
        flat = [[tokens for source in p.sources[:sources] for tokens in source] for p in prompts]
        self._responses = [[lengths[i] for i in kept] for lengths in flat]
        self._sources = tuple(f"source {i // each}" for i in kept)
        self.prompt_lengths = np.array([p.prompt for p in prompts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def response_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of each response [R] int64, offsets [N + 1] int64), as `GroupDataset.response_lengths`."""
        counts = [len(lengths) for lengths in self._responses]
        flat = np.array([tokens for lengths in self._responses for tokens in lengths], dtype=np.int64)
        return flat, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def term_members(self) -> tuple[np.ndarray, np.ndarray]:
        """(members of all terms [E] int64 as positions over all responses, offsets [M + 1] int64 of each term)."""
        _, offsets = self.response_lengths
        flat = (offsets[:-1, None, None] + self._members.astype(np.int64)).reshape(-1)  # no term is padded
        width = self._members.shape[1]
        return flat, np.arange(0, len(flat) + 1, width)

    @property
    def group_lengths(self) -> np.ndarray:
        """Tokens of each group with its prompt counted once: the tokens that are needed. [N] int64."""
        return self.prompt_lengths + np.array([sum(lengths) for lengths in self._responses], dtype=np.int64)

    def __getitem__(self, index: int) -> Group:
        rng = np.random.default_rng((self._seed, index))
        lengths = self._responses[index]

        def tokens(count: int) -> np.ndarray:
            return rng.integers(0, self.vocab_size, count, dtype=np.int32)

        return Group(
            index=index,
            prompt_id=f"prompt {index}",
            prompt=tokens(int(self.prompt_lengths[index])),
            responses=tuple(tokens(count) for count in lengths),
            sources=self._sources,
            rewards=rng.random(len(lengths)),
            members=self._members,
            weights=np.full(len(self._members), 1 / len(self._members)),
        )


def group_terms(kind: str, sources: int, each: int) -> tuple[list[int], np.ndarray]:
    """(which of the sources x each responses are kept, members [m, k] int32 of the loss's terms among those).

    sft: each response. pair: best and worst of each source. rloo: all of a source. wrpo: the best of the first source,
    best and worst of the second, which stands for the target itself.
    """
    all_of = np.arange(sources * each, dtype=np.int32).reshape(sources, each)
    if kind == "sft":
        return all_of.ravel().tolist(), all_of.reshape(-1, 1)
    if kind == "rloo":
        return all_of.ravel().tolist(), all_of
    if kind == "wrpo":
        return [0, each, 2 * each - 1], np.array([[0, 1, 2]], dtype=np.int32)
    return all_of.ravel().tolist(), all_of[:, [0, -1]]
