"""The `triton` backend of the linear log-probs: three matrix products for any loss. Import after `backend.choose`.

Forward: the target's own logit, then the product whose epilogue is the softmax (`_triton_gemm`), chunk by chunk; only
the last chunk's exponentials E are stored, if a gradient is to come. Backward: E's target entries are patched, then
two plain products, `v (E W)` and `E^T (v x)`; earlier chunks make E again first. With all rows in one chunk that is 3
products, otherwise 3 plus the share of rows that were not kept.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megafuse.kernels._linear_parts import LinearOptions, WeightGradient, Workspace, close_gaps
from megafuse.kernels._triton_gemm import exp_product
from megafuse.kernels._triton_linear import (
    bind_gradient,
    finish_targets,
    fold_rows,
    move_anchors,
    sum_tiles,
    target_logits,
)
from megafuse.kernels._vocab_softmax import Head
from megafuse.kernels.backend import on_device

ROWS = 128  # rows of one program of the per-row kernels


@dataclass(frozen=True)
class Tiles:
    """How the large product is cut. The defaults are what fits sm_90: 230 KB of shared memory, 255 registers."""

    bm: int = 128
    bn: int = 256
    bk: int = 64
    warps: int = 8
    stages: int = 4
    tma: bool = True
    upcast: bool = False  # the interpreter only
    programs: int = 132


def plan(x: Tensor, weight: Tensor, entropy: bool) -> Tiles:
    """Tiles for the device, the dtype and the alignment of the operands."""
    if x.device.type == "cpu":  # big tiles: the interpreter pays per operation, not per element
        wide = min(triton.next_power_of_2(max(x.shape[1], 16)), 512)
        return Tiles(32, 128, wide, tma=aligned(x, weight), upcast=True, programs=2)
    major, programs = _device(x.device)
    return tiles_for(x.dtype, entropy, aligned(x, weight), major=major, programs=programs)


def aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether TMA can load both operands."""
    borders = all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0
        for t in (x, weight)
    )
    return borders and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def tiles_for(dtype: torch.dtype, entropy: bool, tma: bool, *, major: int, programs: int) -> Tiles:
    """Tiles for a device of compute capability `major` that runs `programs` blocks at a time; tma: see `aligned`."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, warps=4, stages=3, tma=False, programs=2 * programs)
    if major < 9 or not tma:
        return Tiles(128, 128, 64, stages=3, tma=False, programs=programs)
    # The entropy's temporaries need a smaller accumulator.
    return Tiles(bn=128, stages=3, programs=programs) if entropy else Tiles(programs=programs)


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def cut(rows: int, fit: int, tile: int) -> list[slice]:
    """Chunks of at most `fit` rows (whole tiles where more than one fits). The first one is the rest, if there is any:
    the last, whose exponentials are kept, shall be a full one.
    """
    size = max(1, fit // tile * tile or fit)
    borders = [0, *range(rows % size or size, rows, size), rows] if rows else []
    return [slice(a, b) for a, b in itertools.pairwise(borders)]


def row_stride(columns: int) -> int:
    """Elements from one row of E to the next: TMA wants rows on 16-byte borders."""
    return triton.cdiv(max(columns, 1), 64) * 64


class Product:
    """Launches the large product for chunks of rows, on one workspace."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions, space: Workspace):
        keep, self.space = options.gradient, space
        self.x, self.weight, self.targets, self.options = x, weight, targets, options
        self.head = options.head
        self.tiles = plan(x, weight, options.entropy)
        self.count = triton.cdiv(self.head.columns, self.tiles.bn)  # column tiles
        self.stride = row_stride(self.head.columns)
        row_bytes = self.stride * x.element_size() if keep else 12 * max(self.count, 1)
        self.chunks = cut(x.shape[0], options.workspace_bytes // row_bytes, self.tiles.bm)
        self.e = self.workspace() if keep else None
        self.held: slice | None = None  # the chunk whose E is in the workspace

    def workspace(self) -> Tensor:
        """Memory for E of the largest chunk, the last one."""
        last = self.chunks[-1] if self.chunks else slice(0, 0)
        return self.space.take(last.stop - last.start, self.stride, self.x)

    def release(self) -> None:
        """Give the workspace back: the graph may live on, and a second backward computes again."""
        self.e = self.held = None
        self.space = Workspace()

    def exponentials(self, rows: slice) -> Tensor:
        """The workspace [R, columns] that holds E of a chunk."""
        assert self.e is not None
        return self.e[: rows.stop - rows.start, : self.head.columns]

    def measure(self, rows: slice, anchors: Tensor, sums: Tensor, spread: Tensor, store: bool) -> None:
        """Fill `sums [T]` (and `spread [T]`) for the rows, moving `anchors [T]` where exponentials would overflow."""
        n, new = rows.stop - rows.start, anchors.new_empty
        parts, maxima = new((self.count, n)), new((self.count, n))
        spreads = new((self.count, n)) if self.options.entropy else parts
        marked = torch.empty(n, dtype=torch.int32, device=anchors.device)
        flag = torch.zeros(1, dtype=torch.int32, device=anchors.device)
        grid = (triton.cdiv(n, ROWS),)
        launch = functools.partial(self._launch, rows, anchors, spreads=spreads, marked=marked, flag=flag)
        wide = spread[rows] if self.options.entropy else sums
        finish = functools.partial(
            sum_tiles[grid],
            *(parts, spreads, sums[rows], wide, marked, flag, self.count, n),
            ENTROPY=self.options.entropy,
            BLOCK=ROWS,
        )
        launch(parts=parts, store=store)
        finish(MARK=True)
        # From here on nothing happens, at the cost of four empty launches, unless a row was marked.
        launch(parts=maxima, store=False, maximum=True, guarded=True)
        move_anchors[grid](maxima, marked, flag, anchors[rows], self.count, n, BLOCK=ROWS)
        launch(parts=parts, store=store, guarded=True)
        finish(MARK=False)
        self.held = rows if store else None

    def again(self, rows: slice, anchors: Tensor) -> None:
        """E of a chunk once more, with the anchors that forward settled on."""
        parts = anchors.new_empty((self.count, rows.stop - rows.start))
        self.e = self.e if self.e is not None else self.workspace()
        unread = torch.empty(1, dtype=torch.int32, device=anchors.device)
        self._launch(
            *(rows, anchors), parts=parts, spreads=parts, marked=unread, flag=unread, store=True, entropy=False
        )
        self.held = rows

    def _launch(
        self,
        rows: slice,
        anchors: Tensor,
        *,
        parts: Tensor,
        spreads: Tensor,
        marked: Tensor,
        flag: Tensor,
        store: bool,
        maximum: bool = False,
        guarded: bool = False,
        entropy: bool | None = None,
    ) -> None:
        t, head = self.tiles, self.head
        n = rows.stop - rows.start
        if not n or not head.columns:
            return
        x, weight = self.x[rows], self.weight[: head.columns]
        e = self.exponentials(rows) if store else x
        operands: tuple[Any, ...] = _descriptors(x, weight, e, t, store) if t.tma else (x, weight, e)
        grid = (min(t.programs, triton.cdiv(n, t.bm) * self.count),)
        exp_product[grid](
            *(*operands, self.targets[rows], anchors[rows], parts, spreads, marked, flag),
            *(n, head.columns, head.start, x.stride(0), weight.stride(0), e.stride(0)),
            *transform_arguments(head),
            WIDTH=x.shape[1],
            CAPPED=head.softcap is not None,
            STORE=store,
            ENTROPY=self.options.entropy if entropy is None else entropy,
            MAXIMUM=maximum,
            GUARDED=guarded,
            TMA=t.tma,
            UPCAST=t.upcast,
            BM=t.bm,
            BN=t.bn,
            BK=t.bk,
            GROUP=16,
            PROGRAMS=t.programs,  # not grid[0]: fewer tiles than that are one a program, and would be built anew
            num_warps=t.warps,
            num_stages=t.stages,
        )


def _descriptors(x: Tensor, weight: Tensor, e: Tensor, t: Tiles, store: bool) -> tuple[Any, Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(tensor: Tensor, block: list[int]) -> Any:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)

    rows = describe(x, [t.bm, t.bk])
    return rows, describe(weight, [t.bn, t.bk]), describe(e, [t.bm, t.bn // 2]) if store else rows


def transform_arguments(head: Head) -> tuple[float, float]:
    """`scale, cap` of `_triton_math.transform`."""
    return 1.0 / head.temperature, head.softcap or 1.0


def gather_targets(hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions) -> tuple[Tensor, Tensor]:
    """(hidden row of each target [T, H], z of each target [T], the same on all ranks)."""
    head, rows = options.head, options.rows
    index = rows.rows if rows.row is None else rows.row if rows.rows is None else rows.rows[rows.row]
    n, width = targets.shape[0], hidden.shape[1]
    x = hidden if index is None else hidden.new_empty((n, width))
    z = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n:
        target_logits[(n,)](
            *(hidden, hidden.stride(0), weight, weight.stride(0), targets if index is None else index, targets, x, z),
            *(width, head.start, head.columns, *transform_arguments(head)),
            INDEXED=index is not None,
            CAPPED=head.softcap is not None,
            BLOCK=min(triton.next_power_of_2(width), 2048),
        )
    return x, z if head.group is None else head.gather_checking_shards(z).amax(0)


class TritonRows:
    """`HeadRows` in Triton; a row that predicts several targets is computed for each."""

    def __init__(self, full: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions, space: Workspace):
        self.weight, self.targets, self.options = weight, targets.contiguous(), options
        with on_device(full):
            self.x, self.z = gather_targets(full.contiguous(), weight, self.targets, options)
            self.product = Product(self.x, weight, self.targets, options, space)
        self.anchors = self.saved = self.z
        self.parts = len(self.product.chunks)

    @staticmethod
    def fit(weight: Tensor, workspace_bytes: int) -> int:
        """See `HeadRows`."""
        rows = max(1, workspace_bytes // (row_stride(weight.shape[0]) * weight.element_size()))
        return rows // Tiles.bm * Tiles.bm or rows

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """See `HeadRows`."""
        options, head, z, product = self.options, self.options.head, self.z, self.product
        n = self.targets.shape[0]
        with on_device(z):
            stats = z.new_zeros((3 if options.entropy else 2, n))
            anchors, sums = stats[0], stats[1]
            anchors.copy_(z.masked_fill(z == -torch.inf, 0))
            for rows in product.chunks:
                product.measure(rows, anchors, sums, stats[-1], options.gradient and rows.stop == n)
            parts = head.gather(stats)
            logp, saved = z.new_empty(n), z.new_empty((2, n))
            entropy = z.new_empty(n if options.entropy else 0)
            if n:
                finish_targets[(triton.cdiv(n, ROWS),)](
                    *(parts, parts.shape[0], anchors, z, logp, entropy, saved, n),
                    head.temperature / (head.softcap or 1.0),
                    CAPPED=head.softcap is not None,
                    ENTROPY=options.entropy,
                    BLOCK=ROWS,
                )
        self.anchors, self.saved = anchors, saved
        return logp, entropy

    def gradients(
        self,
        grad: Tensor,
        dx: Tensor | None,
        dw: WeightGradient | None,
        then: Callable[[], None],
        keep: Tensor | None = None,
    ) -> None:
        """See `HeadRows`."""
        product, x = self.product, self.x
        grad, v = grad.contiguous(), torch.zeros_like(self.anchors)
        dense = torch.empty_like(x) if dx is not None else x  # E W of each target
        with on_device(x):
            for part in reversed(product.chunks):  # the last chunk's E is still there
                kept = None if keep is None else keep[part]
                if kept is None or bool(kept.any()):
                    e, scaled, order = self._bind(part, grad, v, dw is not None, kept)
                    if dx is not None and order is not None:  # rows that were dropped have v = 0 and are not read
                        dense[part].index_copy_(0, order, torch.mm(e, self._columns()))
                    elif dx is not None:
                        torch.mm(e, self._columns(), out=dense[part])
                if part.start == 0:
                    self._finish_hidden(dense, v, dx, then)
                if dw is not None and (kept is None or bool(kept.any())):
                    dw.add(e, scaled)
            if not product.chunks:
                self._finish_hidden(dense, v, dx, then)
        product.release()

    def _columns(self) -> Tensor:
        return self.weight[: self.options.head.columns]

    def _bind(
        self, part: slice, grad: Tensor, v: Tensor, scale: bool, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(the exponentials of the part with its coefficients in `v`, `v x`, the places of their rows in the part)."""
        product, x, head = self.product, self.x, self.options.head
        if product.held != part:
            product.again(part, self.anchors)
        e = product.exponentials(part)
        scaled = torch.empty_like(x[part]) if scale else x[part]
        bind_gradient[(e.shape[0],)](
            *(e, e.stride(0), x[part], scaled, v[part], self.targets[part], grad[part], self.saved[0, part]),
            *(self.saved[1, part], x.shape[1], head.start, head.columns, 1.0 / head.temperature),
            SCALED=scale,
            BLOCK=min(triton.next_power_of_2(x.shape[1]), 2048),
        )
        if kept is None or bool(kept.all()):
            return e, scaled, None
        order = close_gaps(e, kept, self.options.workspace_bytes // 32)
        product.held = None
        return e[: order.numel()], scaled[order], order

    def _finish_hidden(self, dense: Tensor, v: Tensor, dx: Tensor | None, then: Callable[[], None]) -> None:
        if dx is not None:
            _fold(dense, v, self.options.rows.row, dx)
        then()


def _fold(dense: Tensor, v: Tensor, row: Tensor | None, out: Tensor) -> None:
    """`out [U, H]`: the products `dense [T, H]` times `v [T]`, added up where targets share a row."""
    if not out.shape[0]:
        return
    order = ends = v
    if row is not None:
        ranked, order = torch.sort(row, stable=True)
        ends = torch.searchsorted(ranked, torch.arange(out.shape[0], device=row.device), right=True)
    block = min(triton.next_power_of_2(dense.shape[1]), 1024)
    fold_rows[(out.shape[0], triton.cdiv(dense.shape[1], block))](
        dense, v, order, ends, out, dense.shape[1], REPEATED=row is not None, BLOCK=block
    )
