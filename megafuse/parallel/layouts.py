"""Which layouts an architecture can be cut into: checked before any process group starts."""

import re
from collections.abc import Iterator
from itertools import product
from math import log2
from typing import Any

from pydantic import ValidationError

from megafuse.config.train import ParallelConfig
from megafuse.errors import ConfigError


def problems(arch: Any, parallel: ParallelConfig, world_size: int) -> list[str]:
    """Why `arch` (ModelArch) cannot be laid out as `parallel` over `world_size` ranks; empty when it can.

    Every sentence names the number, by what it does not divide, and the values that do.
    """
    found = [*_divisions(arch, parallel), *_pipeline(arch, parallel), *_experts(arch, parallel, world_size)]
    if world_size % parallel.model_ranks:
        found.append(
            f"world size {world_size} is not divisible by parallel.tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {parallel.model_ranks}; "
            f"start a multiple of {parallel.model_ranks} processes or another layout"
        )
    return found


def check_layout(arch: Any, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that cannot be.

    Raises:
        ConfigError: with every number that does not divide, and the nearest layout that works at this world size.
    """
    found = problems(arch, parallel, world_size)
    if found:
        near = nearest(arch, parallel, world_size)
        raise ConfigError(
            "; ".join(found) + f". The nearest layout that works on {world_size} rank(s): {describe(near)}"
        )


def describe(parallel: ParallelConfig) -> str:
    """The settings that differ from one process, as they would be typed; `data parallel only` when there are none."""
    default = ParallelConfig()
    named = [f"parallel.{k} = {v}" for k, v in parallel.model_dump().items() if v != getattr(default, k)]
    return ", ".join(str(n).replace("True", "true") for n in named) or "data parallel only"


_SHORT = {
    "tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert",
    "first": "first_stage_layers", "last": "last_stage_layers",
}  # fmt: skip


def parse_layout(text: str) -> tuple[ParallelConfig, bool]:
    """`tp2-sp-pp2-vpp2-cp2-ep2` -> (the layout, whether the optimizer is distributed: `do`). `dp`: data parallel only.

    Raises:
        ConfigError: naming the part that is not understood, and what there is.
    """
    fields: dict[str, Any] = {}
    distributed = False
    for part in text.split("-"):
        match = re.fullmatch(r"([a-z]+?)(\d*)", part)
        name, number = match.groups() if match else ("", "")
        if name == "do" and not number:
            distributed = True
        elif name == "sp" and not number:
            fields["sequence"] = True
        elif name in _SHORT and number:
            fields[_SHORT[name]] = int(number)
        elif name != "dp" or number:
            known = ", ".join(["dp", "do", "sp", *(f"{short}N" for short in _SHORT)])
            raise ConfigError(f"layout {text!r}: {part!r} is not understood; join {known} by '-', such as tp2-sp-pp2")
    try:
        return ParallelConfig(**fields), distributed
    except ValidationError as error:
        raise ConfigError(f"layout {text!r}: {error.errors()[0]['msg']}") from error


def layout_name(parallel: ParallelConfig, distributed: bool = False) -> str:
    """The inverse of `parse_layout`."""
    numbers = [f"{s}{n}" for s, field in _SHORT.items() if (n := getattr(parallel, field)) not in (1, None)]
    return "-".join([*numbers, *(["sp"] if parallel.sequence else []), *(["do"] if distributed else [])] or ["dp"])


def nearest(arch: Any, wanted: ParallelConfig, world_size: int) -> ParallelConfig:
    """The layout that works and is closest to `wanted`: fewest doublings and halvings, summed over the settings."""
    return min(workable(arch, world_size), key=lambda p: (_distance(p, wanted), p.model_ranks))


def workable(arch: Any, world_size: int) -> Iterator[ParallelConfig]:
    """Every layout with evenly cut pipelines that `arch` allows on `world_size` ranks."""
    ways = [d for d in range(1, world_size + 1) if world_size % d == 0]
    experts = [d for d in ways if not (arch.num_experts or 1) % d]
    chunks = [d for d in range(1, arch.num_layers + 1) if arch.num_layers % d == 0]
    for tp, pp, cp in product(ways, ways, ways):
        if world_size % (tp * pp * cp):
            continue
        for vp, ep, sp in product(chunks if pp > 1 else [1], experts, [False, True] if tp > 1 else [False]):
            layout = ParallelConfig(tensor=tp, pipeline=pp, virtual_pipeline=vp, context=cp, expert=ep, sequence=sp)
            if not problems(arch, layout, world_size):
                yield layout


def _distance(one: ParallelConfig, other: ParallelConfig) -> float:
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    steps = sum(abs(log2(getattr(one, name) / getattr(other, name))) for name in names)
    return steps + 0.1 * (one.sequence != other.sequence)


def _divisions(arch: Any, parallel: ParallelConfig) -> Iterator[str]:
    sizes = [("attention heads", arch.num_heads), ("KV heads", arch.num_kv_heads)]
    if not arch.num_experts:
        sizes.append(("MLP width", arch.ffn_hidden_size))
    elif parallel.expert_tensor > 1:
        sizes.append(("expert MLP width", arch.moe_ffn_hidden_size))
    for name, size in sizes:
        if size % parallel.tensor:
            yield _indivisible(name, size, "tensor", parallel.tensor)


def _indivisible(name: str, size: int, key: str, ways: int) -> str:
    divisors = ", ".join(str(d) for d in range(1, min(size, 64) + 1) if size % d == 0)
    return f"{name} = {size} is not divisible by parallel.{key} = {ways}; parallel.{key} may be one of {divisors}"


def _pipeline(arch: Any, parallel: ParallelConfig) -> Iterator[str]:
    """Layers over stages, and the layers of each stage over its chunks."""
    fixed = {"first_stage_layers": parallel.first_stage_layers, "last_stage_layers": parallel.last_stage_layers}
    given = {name: layers for name, layers in fixed.items() if layers is not None}
    left, stages = arch.num_layers - sum(given.values()), parallel.pipeline - len(given)
    if not given and left % stages:
        yield _indivisible("layers", left, "pipeline", stages)
        return
    if left < 0:
        ends = arch.num_layers - left
        yield f"first and last stage have {ends} layers, the model has {arch.num_layers}; give them fewer"
        return
    if left < stages or (stages == 0 and left) or (stages and left % stages):
        ends = " - ".join(f"parallel.{name} {layers}" for name, layers in given.items())
        yield (
            f"layers = {arch.num_layers} - {ends} leaves {left} for {stages} pipeline stages, which does not divide; "
            f"change the layers of the first or last stage, or parallel.pipeline"
        )
        return
    chunks = parallel.virtual_pipeline
    for name, layers in {**given, **({"a pipeline stage": left // stages} if stages else {})}.items():
        if layers % chunks:
            yield (
                f"layers of {name} = {layers} is not divisible by parallel.virtual_pipeline = {chunks}; "
                f"it may be one of {', '.join(str(d) for d in range(1, layers + 1) if layers % d == 0)}"
            )


def _experts(arch: Any, parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    ways, count = parallel.expert, arch.num_experts
    if not count:
        if ways > 1:
            yield f"parallel.expert = {ways}, but {arch.architecture} has no experts; set parallel.expert = 1"
        return
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"{arch.architecture} has experts, and megatron-core trains those with parallel.tensor = {parallel.tensor} "
            f"under sequence parallelism only; set parallel.sequence = true"
        )
    if count % ways:
        yield _indivisible("experts", count, "expert", ways)
    stage = world_size // parallel.pipeline
    if stage % ways:
        yield (
            f"ranks of a pipeline stage = {world_size} / {parallel.pipeline} = {stage} is not divisible by "
            f"parallel.expert = {ways}"
        )
