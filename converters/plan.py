"""From the table and a model's numbers to row ranges: which HF rows stand where in which mcore tensor.

A `Plan` that could lose, repeat or reorder a byte cannot be constructed: `check_bijection` runs first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from megafuse.converters.maps import find
from megafuse.converters.table import Arch, Row, dimensions
from megafuse.converters.views import TensorView, itemsize
from megafuse.errors import IntegrityError, UnsupportedModelError
from megafuse.model.arch import ModelArch

OnRows = Callable[[str, memoryview], None]


@dataclass(frozen=True)
class Piece:
    """Rows `start .. start + rows` of HF tensor `hf` are rows `at .. at + rows` of the mcore tensor `mcore`."""

    hf: str
    start: int
    rows: int
    mcore: str
    at: int


@dataclass(frozen=True)
class Packed:
    """One mcore tensor of one layer (and expert): `shape` is unpadded, `pieces` are in row order."""

    row: Row
    name: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """The name under which mcore stacks this tensor over the layers, and over the experts of a layer."""
        return stacked_key(self.row.mcore)

    @property
    def place(self) -> tuple[int, ...]:
        """Where in the stack it is: (), (layer,) or (layer, expert)."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    def gather(self, source: TensorView, start: int, out: memoryview, width: int, seen: OnRows | None = None) -> None:
        """Fill `out` with packed rows of `width` bytes from `start` on; rows past the end (padding) become zero.

        seen: told of every (HF name, bytes), in the order of reading.
        """
        stop = start + len(out) // width
        for piece in self.pieces:
            low, high = max(start, piece.at), min(stop, piece.at + piece.rows)
            if low < high:
                part = out[(low - start) * width : (high - start) * width]
                shift = piece.start - piece.at
                source.read(piece.hf, low + shift, high + shift, part)
                if seen:
                    seen(piece.hf, part)
        end = max(self.shape[0], start)
        if stop > end:
            out[(end - start) * width :] = bytes((stop - end) * width)


def stacked_key(pattern: str) -> str:
    """A name of the table without its layer and expert: what mcore calls the tensor that holds all of them."""
    return pattern.replace(".{i}.", ".").replace(".{e}.", ".")


class Plan:
    """A whole model: `tensors` by mcore name, `hf_shapes` and `pieces` by HF name, all in table order.

    `placed` has the tensors by (mcore's stacked key, place in the stack).

    Raises IntegrityError where the table does not map bytes one to one.
    """

    def __init__(self, model: ModelArch, table: Arch | None = None) -> None:
        self.model = model
        self.table = table or find(model.architecture)
        self.tensors: dict[str, Packed] = {}
        self.hf_shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[Piece]] = {}
        for row in self.table.rows:
            if row.untied_only and model.tie_word_embeddings:
                continue
            for layer in range(model.num_layers) if row.stage == "layer" else (None,):
                for expert in range(model.num_experts or 0) if row.experts else (None,):
                    self._add(row, layer, expert)
        self.placed = {(packed.key, packed.place): packed for packed in self.tensors.values()}
        check_bijection(self)

    def _add(self, row: Row, layer: int | None, expert: int | None) -> None:
        def numbered(pattern: str) -> str:
            return pattern.replace("{i}", str(layer)).replace("{e}", str(expert))

        sizes = dimensions(self.model)
        shapes = {numbered(hf.name): tuple(sizes[letter] for letter in hf.dims) for hf in row.hf}
        name = numbered(row.mcore)
        groups = self.model.num_kv_heads if row.pack == "grouped" else 1
        pieces: list[Piece] = []
        at = 0
        for group in range(groups):
            for hf, shape in shapes.items():
                rows = shape[0] // groups
                pieces.append(Piece(hf, group * rows, rows, name, at))
                self.pieces.setdefault(hf, []).append(pieces[-1])
                at += rows
        if len({shape[1:] for shape in shapes.values()}) != 1:
            raise IntegrityError(f"table of {self.table.name}: {row.mcore} joins tensors of different widths {shapes}")
        first = next(iter(shapes.values()))
        self.tensors[name] = Packed(row, name, layer, expert, (at, *first[1:]), tuple(pieces))
        self.hf_shapes.update(shapes)

    @property
    def parameters(self) -> int:
        """Number of stored weights."""
        return sum(prod(shape) for shape in self.hf_shapes.values())

    @property
    def tied_twin(self) -> tuple[str, str] | None:
        """(output layer, embedding) by HF name where they are one tensor: a folder may hold both, if they are equal."""
        return self.table.tied_output if self.model.tie_word_embeddings else None

    def is_derived(self, name: str) -> bool:
        """An HF tensor that follows from the configuration."""
        return name.endswith(self.table.derived)

    def stack(self, row: Row | str) -> tuple[int, ...]:
        """How many there are of a row or module of the table: (), (layers,) or (layers, experts)."""
        pattern = row if isinstance(row, str) else row.mcore
        layers = (self.model.num_layers,) if "{i}" in pattern else ()
        return (*layers, self.model.num_experts or 0) if "{e}" in pattern else layers

    def extra_states(self) -> Iterator[str]:
        """Keys of the `_extra_state` objects that a strict mcore load asks for: `KEY/shard_PLACE_STACK`."""
        for module in self.table.extra_states:
            stack = self.stack(module) or (1,)
            for place in product(*map(range, stack)):
                yield f"{stacked_key(module)}_extra_state/shard_{_dotted(place)}_{_dotted(stack)}"

    def check(self, view: TensorView, *, where: str) -> None:
        """Compare the plan with what is there: names, shapes, and one dtype per (stacked) mcore tensor.

        Raises UnsupportedModelError for a tensor that the table does not know or a dtype that it cannot copy,
        IntegrityError for a missing tensor or another shape.
        """
        there = set(view.names())
        twin = self.tied_twin[0] if self.tied_twin else None
        unknown = sorted(n for n in there - set(self.hf_shapes) if n != twin and not self.is_derived(n))
        if unknown:
            raise UnsupportedModelError(
                f"{where}: {len(unknown)} tensors are not in the table of {self.table.name}, and would be lost: "
                f"{', '.join(unknown[:5])}"
            )
        missing = sorted(set(self.hf_shapes) - there)
        if missing:
            raise IntegrityError(f"{where}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
        for name, shape in self.hf_shapes.items():
            if tuple(view.shape(name)) != shape:
                raise IntegrityError(
                    f"{where}: {name} has shape {list(view.shape(name))}, config.json implies {list(shape)}"
                )
        dtypes: dict[str, str] = {}
        for packed in self.tensors.values():
            for piece in packed.pieces:
                dtype = view.dtype(piece.hf)
                itemsize(dtype)
                if dtypes.setdefault(packed.key, dtype) != dtype:
                    raise UnsupportedModelError(
                        f"{where}: {piece.hf} is {dtype}, but other parts of {packed.key} are {dtypes[packed.key]}; "
                        "fix: store the tensors of one kind in one dtype"
                    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def check_bijection(plan: Plan) -> None:
    """Every row of every HF tensor is read exactly once, every row of every mcore tensor is written exactly once.

    With equal widths (checked while joining) this holds for bytes. Raises IntegrityError, naming the tensor.
    """
    for name, shape in plan.hf_shapes.items():
        _tiles(name, sorted((p.start, p.rows) for p in plan.pieces[name]), shape[0])
    for packed in plan.tensors.values():
        _tiles(packed.name, [(p.at, p.rows) for p in packed.pieces], packed.shape[0])
    total = sum(prod(packed.shape) for packed in plan.tensors.values())
    if total != plan.parameters:
        raise IntegrityError(f"table of {plan.table.name}: {plan.parameters} HF elements become {total} mcore elements")


def _tiles(name: str, ranges: list[tuple[int, int]], rows: int) -> None:
    at = 0
    for start, count in ranges:
        if start != at or count <= 0:
            raise IntegrityError(f"{name}: rows {min(at, start)}..{max(at, start)} are left out or used twice")
        at += count
    if at != rows:
        raise IntegrityError(f"{name}: {at} of {rows} rows are used")
