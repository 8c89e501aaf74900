"""How often torch compiles FlexAttention, and what it is told of lengths: Dynamo asks no device, so a CPU can count."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention import flex_attention as torch_flex

from megafuse.model import flex
from megafuse.model.attention import sdpa_attend, sdpa_blocks

Shape = tuple[int, int, int]  # query heads, key heads, width
LIMIT = 3  # graphs of one function: the first length, any length, a single tile; torch allows 8
KINDS: list[tuple[Shape, dict[str, Any]]] = [  # a reference, its run, other models, an evaluation in one process
    ((4, 2, 16), {}),
    ((4, 2, 16), {"grad": True}),
    ((4, 2, 16), {"grad": True, "dtype": torch.bfloat16}),
    ((6, 2, 16), {"grad": True}),
    ((4, 4, 32), {}),
    ((4, 2, 16), {"window": 32}),
    ((4, 2, 16), {"softcap": 0.6}),
    ((4, 2, 16), {"softcap": 0.9, "window": 8}),
]


class Counter:
    """A backend of torch.compile that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def take(self) -> list[torch.fx.GraphModule]:
        taken, self.graphs = self.graphs, []
        return taken


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Graphs that CUDA would compile: everything but the backend is as there."""
    counter = Counter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counter, **options))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)  # no gradients on a CPU, says torch
    torch._dynamo.reset()
    flex._kernel.cache_clear()
    flex.compiled_mask.cache_clear()
    yield counter
    torch._dynamo.reset()
    flex._kernel.cache_clear()
    flex.compiled_mask.cache_clear()


@pytest.fixture
def rng() -> torch.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def row(rng: torch.Generator, length: int) -> torch.Tensor:
    """Prompts with four responses each that share them, padded. [2, length] int32"""
    segment: list[int] = []
    parent: list[int] = []
    while len(segment) < length - 100:
        prompt = max([-1, *segment]) + 1
        for i, size in enumerate(torch.randint(2, 20, (5,), generator=rng).tolist()):
            segment += [prompt + i] * size
            parent += [prompt] * size
    pad = [-1] * (length - len(segment))
    return torch.tensor([segment + pad, parent + pad], dtype=torch.int32)


def attend(
    rng: torch.Generator,
    length: int,
    shape: Shape,
    *,
    grad: bool = False,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the compiled functions give, what sdpa gives) for a row in the strides that mcore hands in."""
    layout, places = row(rng, length), torch.arange(length)
    operands = [
        torch.randn(length, 1, heads, shape[2], generator=rng).to(dtype).requires_grad_(grad).permute(1, 2, 0, 3)
        for heads in (shape[0], shape[1], shape[1])
    ]
    with pytest.MonkeyPatch.context() as patch:  # a mask as on CUDA: compiled
        patch.setattr(flex, "create_block_mask", flex.compiled_mask(window is not None))
        mask = flex.flex_mask(layout[0], layout[1], places, window)
    with torch.set_grad_enabled(grad):
        ours = flex.attend_compiled(*operands, mask, 0.25, softcap)
        blocks = sdpa_blocks(layout[0], layout[1], places, window)
        return ours, sdpa_attend(*operands, blocks, 0.25, softcap)


def attentions(graphs: list[torch.fx.GraphModule]) -> list[torch.fx.Node]:
    """The call of flex_attention in each graph that has one."""
    nodes = (node for graph in graphs for node in graph.graph.nodes)
    return [n for n in nodes if n.op == "call_function" and "flex_attention" in str(n.target)]


def test_every_kind_is_compiled_equals_sdpa_and_knows_that_lengths_are_whole_tiles(
    graphs: Counter, rng: torch.Generator
) -> None:
    """Where the length is a symbol, it is 128 times a symbol: kernels then load without masks."""
    total = 0
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        for shape, settings in KINDS:
            for length in (256, 384, 640, 384, *([128] if settings == {} else [])):
                ours, theirs = attend(rng, length, shape, **settings)
                atol = 2e-2 if ours.dtype == torch.bfloat16 else 1e-5  # 8 bits of mantissa
                torch.testing.assert_close(ours, theirs, rtol=atol, atol=atol)
                if settings.get("grad"):
                    ours.float().sum().backward()
            calls = attentions(graphs.take())
            assert 2 <= len(calls) <= LIMIT, (shape, settings)
            total += len(calls)
            sizes = [[operand.meta["example_value"].size() for operand in call.args[:3]] for call in calls]
            assert all({s[1] for s in three} == set(shape[:2]) and three[0][3] == shape[2] for three in sizes)
            symbols = [s[2] for three in sizes for s in three if isinstance(s[2], torch.SymInt)]
            assert len(symbols) == 3 and all(not s.node.expr.is_Symbol for s in symbols)
            assert all(statically_known_true(s % flex.TILE == 0) for s in symbols)
    assert total > 2 * 8 - 1  # of one function torch compiles 8


def test_one_function_for_all_kinds_meets_the_limit(
    graphs: Counter, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: closures that share their code. torch would go on uncompiled; it raises."""
    monkeypatch.setattr(flex, "alone", lambda function, kind: function)
    with torch._dynamo.config.patch(recompile_limit=LIMIT), pytest.raises(FailOnRecompileLimitHit):
        for shape, settings in KINDS[:4]:
            attend(rng, 256, shape, **settings)


def test_a_length_that_is_no_whole_tile_is_refused() -> None:
    layout = torch.zeros(2, 100, dtype=torch.int32)
    mask = flex.flex_mask(layout[0], layout[1], torch.arange(100))
    operands = (torch.zeros(1, 2, 100, 16) for _ in range(3))
    with pytest.raises(ValueError, match="100 queries and 100 keys are not multiples of 128"):
        flex.attend_compiled(*operands, mask, 1.0, None)
