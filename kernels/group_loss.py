"""The LM head and a loss of whole groups in one go: three matrix products at one workspace, for every loss of ours.

The coefficient that a token's log-prob gets in backward depends on nothing but the sums of the responses that share a
term of the loss with it. So the row is cut into chunks that no term leaves, as many targets as the workspace holds, and
each chunk is finished before the next one begins: product, exponentials, log-probs, sums, loss, coefficients, and from
the exponentials, which are still there, the two products of the gradients. `linear_logprobs` sees the coefficients only
when the whole row has been through, and has to make all exponentials but the last workspace's again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.errors import ConfigError
from megafuse.kernels._arguments import owned_somewhere
from megafuse.kernels._linear_autograd import GivenGradient, hidden_gradient, rows_of
from megafuse.kernels._linear_parts import (
    HeadRows,
    HiddenGradient,
    LinearOptions,
    WeightGradient,
    Workspace,
    whole_sequence,
)
from megafuse.kernels._segments import segment_logprobs
from megafuse.kernels.logprob import prepare, row_map

LossOfSums = Callable[[Tensor, Tensor, slice], tuple[Tensor, Any]]
"""`loss(sums [n], lengths [n], part) -> (value [], anything)`: the part of the loss whose terms involve the responses
`part`, a run of whole blocks, from their log-prob sums and lengths. What stands outside `part` must not matter."""


@dataclass(frozen=True)
class Blocks:
    """How the targets of a row belong to its n responses, and where the row may be cut. Lives on the host.

    Raises ConfigError when the two disagree about n, and on numbers that are no counts.
    """

    counts: (
        Tensor  # [C, n] int64, CPU: targets of each response on each context-parallel rank, one response after another
    )
    sizes: tuple[int, ...]  # responses of each block: a run of responses that no term of the loss leaves

    def __post_init__(self) -> None:
        wrong = [s for s in self.sizes if not isinstance(s, int) or isinstance(s, bool) or s < 0]
        if wrong:
            raise ConfigError(f"blocks.sizes holds {wrong[0]!r}: numbers of responses (int, not negative) are needed")
        if self.counts.ndim != 2 or self.counts.device.type != "cpu" or self.counts.shape[1] != sum(self.sizes):
            shape = f"{list(self.counts.shape)} on {self.counts.device}"
            raise ConfigError(f"blocks.counts is {shape}: [ranks, {sum(self.sizes)}] on the CPU is needed")
        if self.counts.dtype != torch.int64:
            raise ConfigError(f"blocks.counts is {self.counts.dtype}: numbers of targets as int64 are needed")
        if self.counts.numel() and int(self.counts.min()) < 0:
            raise ConfigError(f"blocks.counts holds {int(self.counts.min())}: a number of targets is not negative")

    def cut(self, fit: int) -> list[slice]:
        """Runs of whole blocks (slices of the responses) with at most `fit` targets on every rank.

        Greedy, so as few as their order allows. A block that does not fit is a run of its own.
        """
        runs: list[slice] = []
        load, start, end = torch.zeros(self.counts.shape[0], dtype=torch.int64), 0, 0
        for size in self.sizes:
            more = self.counts[:, end : end + size].sum(1)
            if end > start and int((load + more).max()) > fit:
                runs.append(slice(start, end))
                load, start = torch.zeros_like(load), end
            load, end = load + more, end + size
        return [*runs, slice(start, end)] if end > start else runs


@dataclass(frozen=True)
class GroupLoss:
    """A loss, and what the LM head has to know of the row that it is taken of."""

    loss: LossOfSums
    blocks: Blocks
    cp_group: dist.ProcessGroup | None = None
    vanishes: bool = True
    """Whether a response's coefficient may well be 0: then its rows are left out of the gradient's products, at the
    price of asking the device once a chunk. On a CPU it is always asked."""


def linear_group_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    groups: GroupLoss,
    *,
    row_index: Tensor | None = None,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = 1 << 30,
    backend: str = "auto",
    vocab_size: int | None = None,
    accumulate: str = "grad",
) -> tuple[Tensor, Any]:
    """`groups.loss` of the sums of `linear_logprobs` by response: (value [] with a gradient, the loss's second result).

    The same as taking the loss of `segment_logprobs(linear_logprobs(..))`, but the gradients are computed here, while
    the workspace still holds what they are made of: 3 products instead of 3 and the share of rows beyond a workspace.
    `targets [T]` are those of this rank, in the order of `groups.blocks`. `groups.loss` is called for each chunk, its
    gradient by the sums is taken, and, if there are several chunks, once more for the whole row: that call's value and
    second result are returned. A block with more targets than the workspace holds goes the way of `linear_logprobs`:
    the rows beyond it take 4 products.

    Collectives: those of `linear_logprobs` and of `segment_logprobs`, once a chunk; chunks are the same on all ranks
    because they follow from `groups.blocks`. That needs equally large shards of the weight (`vocab_start` = rank x V).

    With `accumulate` "main_grad" (or "auto" and such a weight) the weight's gradient is in `main_grad` when this
    returns; the gradient that backward brings must then be 1 (see `GivenGradient`). Without a gradient to come nothing
    but the sums is computed. Other arguments and errors: see `linear_logprobs`; ConfigError also where `groups` does
    not fit the targets.
    """
    options, chosen = prepare(
        *(hidden, weight, targets, False, row_index, vocab_start, tp_group, sequence_parallel),
        *(temperature, softcap, workspace_bytes, backend, vocab_size, accumulate),
    )
    counts = _own_counts(groups, targets)
    group = options.head.group
    if group is not None and vocab_start != group.rank() * weight.shape[0]:
        raise ConfigError(
            f"vocab_start={vocab_start} on rank {group.rank()} of tp_group: shards of equally many rows are needed, "
            f"and this rank's has {weight.shape[0]}"
        )
    index = torch.arange(targets.shape[0]) if row_index is None else row_index.detach().to("cpu", torch.int64)
    with torch.no_grad():
        work = _Work(hidden, weight, targets, groups, options, counts, index, rows_of(chosen), chosen)
        value, beside = work.run()
    if not options.gradient:
        return value, beside
    dx = work.dx.finish() if work.dx is not None else None
    added = work.dw if options.main_grad else None
    dw = work.dw.result() if work.dw is not None and added is None else None
    return GivenGradient.apply(hidden, weight, value, dx, dw, added), beside


def _own_counts(groups: GroupLoss, targets: Tensor) -> Tensor:
    """Targets of each response [n] on this rank, known to fit the tensors."""
    cp, counts = groups.cp_group, groups.blocks.counts
    ranks, rank = (1, 0) if cp is None else (cp.size(), cp.rank())
    if counts.shape[0] != ranks:
        raise ConfigError(f"blocks.counts has {counts.shape[0]} rows for {ranks} context-parallel ranks")
    if int(counts[rank].sum()) != targets.shape[0]:
        raise ConfigError(
            f"blocks.counts has {int(counts[rank].sum())} targets on this rank, targets {targets.shape[0]}"
        )
    return counts[rank]


class _Work:
    """The loop over chunks. After `run`, `dx` and `dw` hold the gradients, if any are wanted."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        groups: GroupLoss,
        options: LinearOptions,
        counts: Tensor,
        index: Tensor,
        kind: type[HeadRows],
        backend: str,
    ):
        self.weight, self.targets, self.groups, self.options = weight, targets, groups, options
        self.counts, self.index, self.kind, self.backend = counts, index, kind, backend
        self.full = whole_sequence(hidden, options)
        responses = counts.shape[0]
        everything = [slice(0, responses)] if responses else []
        fit = kind.fit(weight, options.workspace_bytes)
        self.chunks = groups.blocks.cut(fit) if options.gradient else everything
        self.starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        largest = max((int(self.starts[c.stop] - self.starts[c.start]) for c in self.chunks), default=0)
        self.space = Workspace(min(largest, fit))
        self.distinct = torch.unique(index) if len(self.chunks) > 1 else index
        self.dx: HiddenGradient | None = None
        self.dw: WeightGradient | None = None
        self.need_w = options.gradient and weight.requires_grad
        if options.gradient and hidden.requires_grad:
            self.dx = hidden_gradient(hidden, options)
            if len(self.chunks) != 1:
                self.dx.local.zero_()
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.sums = torch.zeros(responses, dtype=wide, device=hidden.device)
        self.lengths = torch.zeros(responses, dtype=torch.int64, device=hidden.device)

    def run(self) -> tuple[Tensor, Any]:
        """(value, what the loss gives beside), of the whole row."""
        result: tuple[Tensor, Any] | None = None
        for number, chunk in enumerate(self.chunks):
            result = self._chunk(chunk, last=number + 1 == len(self.chunks))
        if not self.chunks:
            if self.dx is not None:
                self.dx.start()  # zeros, but the collective is the other ranks' too
            if self.need_w:
                self.dw = WeightGradient(self.weight, self.options.head.columns, 0, self.options.main_grad)
        if result is None or len(self.chunks) > 1:
            result = self.groups.loss(self.sums, self.lengths, slice(0, self.counts.shape[0]))
        return result[0].detach(), result[1]

    def _chunk(self, chunk: slice, *, last: bool) -> tuple[Tensor, Any]:
        """Log-probs, sums and loss of whole blocks, and what they add to both gradients."""
        targets = slice(int(self.starts[chunk.start]), int(self.starts[chunk.stop]))
        of_target = torch.repeat_interleave(self.counts[chunk])  # [T_c] which of the chunk's responses, on the host
        ids = of_target.to(self.sums.device, non_blocking=True)
        mine = self.targets[targets]
        options = self._options(targets)
        rows = self.kind(self.full, self.weight, mine, options, self.space)
        logp = owned_somewhere(rows.logprobs()[0], mine, options.head)
        sums, lengths = segment_logprobs(
            logp, ids, chunk.stop - chunk.start, cp_group=self.groups.cp_group, backend=self.backend
        )
        self.sums[chunk], self.lengths[chunk] = sums, lengths
        if not self.options.gradient:
            return self.groups.loss(self.sums, self.lengths, chunk)
        result, coefficients = self._coefficients(chunk)
        keep = None
        if self.groups.vanishes or coefficients.device.type == "cpu":
            keep = (coefficients != 0).cpu()[of_target]  # NaN is kept
            keep = None if bool(keep.all()) else keep
        if self.need_w and self.dw is None:
            several = 2 if len(self.chunks) > 1 else rows.parts
            self.dw = WeightGradient(self.weight, options.head.columns, several, options.main_grad)
        dx, then = self._hidden_of(options, targets, last)
        rows.gradients(coefficients.to(logp.dtype)[ids], dx, self.dw, then, keep)
        return result

    def _options(self, targets: slice) -> LinearOptions:
        """Those of the row, with the map of the chunk's own targets."""
        if len(self.chunks) == 1:
            return self.options
        mapped = row_map(self.index[targets], self.targets[targets], self.full.shape[0], self.full.device)
        return replace(self.options, rows=mapped)

    def _coefficients(self, chunk: slice) -> tuple[tuple[Tensor, Any], Tensor]:
        """(the loss of the chunk's terms, its gradient by the chunk's sums)."""
        leaf = self.sums.clone().requires_grad_()
        with torch.enable_grad():
            value, beside = self.groups.loss(leaf, self.lengths, chunk)
        if not value.requires_grad:  # no term at all
            return (value, beside), torch.zeros_like(self.sums[chunk])
        (grad,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
        return (value.detach(), beside), grad[chunk]

    def _hidden_of(
        self, options: LinearOptions, targets: slice, last: bool
    ) -> tuple[Tensor | None, Callable[[], None]]:
        """(where the chunk's part of d loss / d hidden goes, what to do when it is there)."""
        total = self.dx
        if total is None:
            return None, lambda: None
        if len(self.chunks) == 1:
            return total.local, total.start
        part = total.local.new_empty((options.rows.count, total.local.shape[1]))
        own = torch.unique(self.index[targets])
        place = torch.searchsorted(self.distinct, own).to(part.device, non_blocking=True)

        def add() -> None:
            total.local.index_add_(0, place, part)  # distinct rows: no order to depend on
            if last:
                total.start()  # the ranks' parts travel while the weight's gradient is computed

        return part, add
