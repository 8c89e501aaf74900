"""What the backends of the linear log-probs share: the row map, the workspace, and where the two gradients go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.kernels._collectives import gather_ranks
from megafuse.kernels._vocab_softmax import Head, compute_dtype


@dataclass(frozen=True)
class RowMap:
    """Which hidden row predicts which target. Built on the host, which must know the sizes."""

    rows: Tensor | None  # [U] the distinct hidden rows, ascending; None: all of them
    row: Tensor | None  # [T] position in `rows` of each target's row; None: U == T, in order
    first: Tensor | None  # [U] one target of each row; None as above
    count: int  # U


@dataclass(frozen=True)
class LinearOptions:
    """The arguments of the linear log-probs that are no tensors."""

    head: Head
    rows: RowMap
    sequence_parallel: bool
    workspace_bytes: int
    entropy: bool  # the entropies [T] are wanted too
    main_grad: bool  # the weight's gradient is added to weight.main_grad
    gradient: bool  # a backward may follow


class Workspace:
    """Memory for exponentials that sets of targets, one after the other, use again; made when it is first needed."""

    def __init__(self, rows: int = 0):
        self.rows = rows  # of the largest set that will come
        self.flat: Tensor | None = None

    def take(self, rows: int, stride: int, like: Tensor) -> Tensor:
        """[rows, stride] in the dtype of `like`, with whatever is in it."""
        if self.flat is None or self.flat.numel() < rows * stride:
            self.flat = like.new_empty(max(rows, self.rows) * stride)
        return self.flat[: rows * stride].view(rows, stride)


class HeadRows(Protocol):
    """A set of targets on its way through the head: log-probs first, then, once, the gradients of a loss of them."""

    def __init__(self, full: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions, space: Workspace): ...

    @staticmethod
    def fit(weight: Tensor, workspace_bytes: int) -> int:
        """Targets whose exponentials the workspace keeps; equal on ranks with equally large shards of the weight."""

    @property
    def parts(self) -> int:
        """Pieces that the workspace cuts the targets into; of all but one the exponentials are computed twice."""

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """(log-probs [T], entropies [T] or [0]). Collective over the vocabulary's group."""

    def gradients(
        self,
        grad: Tensor,
        dx: Tensor | None,
        dw: WeightGradient | None,
        then: Callable[[], None],
        keep: Tensor | None = None,
    ) -> None:
        """From `grad [T]` fill `dx [U, H]`, this rank's part for the distinct rows, and add to `dw`.

        `then()` is called once, when `dx` is complete and one product for `dw` is still to come. `keep [T]` bool, on
        the host: the targets whose `grad` is not 0; the others' rows are left out of all products.
        """


def nonzero_on_host(grad: Tensor) -> Tensor | None:
    """`keep` of `HeadRows.gradients` where looking costs nothing, None where the device would have to be waited for."""
    return grad.detach() != 0 if grad.device.type == "cpu" else None


def close_gaps(rows: Tensor, keep: Tensor, max_bytes: int) -> Tensor:
    """Move the rows of `rows [R, C]` that `keep [R]` (host) names to the front, in place; the old places [k] of these.

    A gap is filled with a row from the end, so at most half of the rows move. `max_bytes` bounds the copies in flight.
    """
    count, place = int(keep.sum()), torch.arange(keep.numel())
    gaps, tail = place[:count][~keep[:count]], place[count:][keep[count:]]
    order = place[:count].clone()
    order[gaps] = tail
    gaps, tail = gaps.to(rows.device), tail.to(rows.device)
    step = max(1, max_bytes // max(rows.shape[1] * rows.element_size(), 1))
    for a in range(0, gaps.numel(), step):
        rows.index_copy_(0, gaps[a : a + step], rows.index_select(0, tail[a : a + step]))
    return order.to(rows.device)


def whole_sequence(hidden: Tensor, options: LinearOptions) -> Tensor:
    """All hidden rows of the sequence: `hidden`, or with sequence parallelism every rank's, gathered."""
    if options.sequence_parallel and options.head.group is not None:
        return gather_ranks(hidden, options.head.group).flatten(0, 1)
    return hidden


class HiddenGradient:
    """d loss / d hidden: the sum over the vocabulary shards, put back on the rows that it belongs to.

    Ranks add in float32: a bfloat16 sum over many ranks would round once a hop.
    """

    def __init__(self, like: Tensor, options: LinearOptions, hidden_rows: int, dtype: torch.dtype | None = None):
        self.options, self.hidden_rows, self.dtype = options, hidden_rows, like.dtype
        shape = (options.rows.count, like.shape[1])
        self.local = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)  # this rank's vocabulary only
        self.sum = self.local
        self.work: dist.Work | None = None

    def start(self) -> None:
        """Begin the reduction: all-reduce of the distinct rows, or reduce-scatter of the sequence."""
        group = self.options.head.group
        if group is None:
            return
        self.sum = self.local.to(compute_dtype(self.local))
        if self.options.sequence_parallel:
            full = self._scatter(self.sum, self.hidden_rows * group.size())
            self.sum = full.new_empty((self.hidden_rows, full.shape[1]))
            self.work = dist.reduce_scatter_tensor(self.sum, full, group=group, async_op=True)
        else:
            self.work = dist.all_reduce(self.sum, group=group, async_op=True)

    def finish(self) -> Tensor:
        """The gradient [rows of hidden, H] in the dtype of hidden."""
        if self.work is not None:
            self.work.wait()
        grad = self.sum.to(self.dtype)
        scattered = self.options.sequence_parallel and self.options.head.group is not None
        return grad if scattered else self._scatter(grad, self.hidden_rows)

    def _scatter(self, grad: Tensor, rows: int) -> Tensor:
        index = self.options.rows.rows
        return grad if index is None else grad.new_zeros((rows, grad.shape[1])).index_copy_(0, index, grad)


class WeightGradient:
    """d loss / d weight [V_local, H], summed in float32 over several chunks; padded rows get 0.

    With `main_grad` it is ADDED to `weight.main_grad`, which may hold earlier micro-batches and, with tied embeddings,
    the embedding's part. The returned tensor then only tells autograd's hooks that the gradient came: megatron-core's
    data parallelism ignores its contents where `grad_added_to_main_grad` is set, unless the weight has
    `zero_out_wgrad` (tied embeddings: autograd adds the embedding's gradient to it), which asks for zeros.
    """

    def __init__(self, weight: Tensor, columns: int, chunks: int, main_grad: bool):
        self.weight, self.columns, self.main_grad = weight, columns, main_grad
        self.fresh = not main_grad  # the next product overwrites instead of adding
        if main_grad:
            self.sum: Tensor = weight.main_grad  # type: ignore[attr-defined]
        else:
            dtype = compute_dtype(weight) if chunks > 1 else weight.dtype
            self.sum = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self.sum[columns:] = 0

    def add(self, dz: Tensor, x: Tensor) -> None:
        """Add `dz^T x` of one chunk."""
        _add_product(self.sum[: self.columns], dz.t(), x, self.fresh)
        self.fresh = False

    def result(self) -> Tensor | None:
        """What backward returns for the weight."""
        if not self.main_grad:
            if self.fresh:  # no chunk at all
                self.sum.zero_()
            return self.sum.to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        zero = getattr(self.weight, "zero_out_wgrad", False)
        return torch.zeros_like(self.weight) if zero else torch.empty_like(self.weight)


def _add_product(out: Tensor, a: Tensor, b: Tensor, overwrite: bool) -> None:
    """`out (+)= a @ b`, float32 out of bfloat16 factors without rounding in between where torch can (CUDA, 2.8)."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if overwrite else 1, out=out)
    elif wide_products(out.device, a.dtype, out.dtype):
        kinds: dict[str, Any] = {"out_dtype": out.dtype, "out": out}
        torch.mm(a, b, **kinds) if overwrite else torch.addmm(out, a, b, **kinds)
    elif overwrite:
        out.copy_(torch.mm(a, b))
    else:
        out += torch.mm(a, b)  # one rounding a chunk, none of the running sum


@functools.cache
def wide_products(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `mm` and `addmm` write float32 out of bfloat16 factors on this device: tried once on a small product."""
    if device.type != "cuda":
        return False
    a, out = torch.zeros((16, 16), dtype=narrow, device=device), torch.zeros((16, 16), dtype=wide, device=device)
    kinds: dict[str, Any] = {"out_dtype": wide, "out": out}
    try:
        torch.mm(a, a, **kinds)
        torch.addmm(out, a, a, **kinds)
    except (RuntimeError, TypeError):
        return False
    return True
