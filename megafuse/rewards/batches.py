"""Batches of token sequences of about one length, padded so that no padding can reach a score."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches: longest first, so that a shortage of memory shows at once; padded size <= batch_tokens.

    A sequence that is longer than that is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def padded(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [n, t] int64, attention mask [n, t] int64, lengths [n] int64), padded on the right."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), pad_id)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = torch.tensor(sequence)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(device), mask.to(device), lengths.to(device)


def unused_id(sequences: Sequence[Sequence[int]], preferred: int | None, vocab_size: int) -> int:
    """A token id that occurs in none of the sequences: `preferred` if that is one.

    Transformers' sequence classifiers look for the last token that is not the padding id: where that id also ends the
    text (pad = eos), they would score another position.
    """
    used = {token for sequence in sequences for token in sequence}
    if preferred is not None and preferred not in used:
        return preferred
    return next(token for token in range(vocab_size) if token not in used)
