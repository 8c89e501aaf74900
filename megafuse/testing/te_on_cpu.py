"""Transformer Engine's modules without a GPU: they are built, named, cut, loaded and saved; they cannot compute."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


@contextmanager
def te_on_cpu() -> Iterator[None]:
    """Inside, Transformer Engine (and nobody else) is told that there is a CUDA device of compute capability 9.0.

    Raises ImportError where it is not installed.
    """
    import transformer_engine.pytorch  # noqa: F401 (its import must not be told)

    told: dict[str, Any] = {
        "is_available": True,
        "current_device": "cpu",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(major=9, minor=0, name="none", multi_processor_count=1),
    }
    patches = [mock.patch.object(torch.cuda, name, _told(getattr(torch.cuda, name), it)) for name, it in told.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _told(real: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        return answer if caller.startswith("transformer_engine") else real(*args, **kwargs)

    return asked


@dataclass(frozen=True)
class Flavours:
    """What one rank found at one layout.

    Attributes:
        layout: its name, as `parallel.layouts.parse_layout` reads it.
        names: the TE flavour's parameters with their shapes, layers and experts counted from 0 on each rank.
        apart: sharded tensors (key, whole shape, part, dtype) that only one of the two flavours has.
        states: keys of the `_extra_state` entries that the TE flavour asks for.
        wrong: parameters that differ after megatron-core loaded the checkpoint into the TE flavour.
        direct: those that differ after the Hugging Face folder was loaded without a checkpoint.
        compared: how many were compared each time.
    """

    layout: str
    names: dict[str, tuple[int, ...]]
    apart: tuple[Any, ...]
    states: tuple[str, ...]
    wrong: tuple[str, ...]
    direct: tuple[str, ...]
    compared: int


def look_at_flavours(asked: list[tuple[Path, Path, list[str], Path | None]]) -> list[list[Flavours]]:
    """For each (checkpoint, Hugging Face folder, layouts, folder for what TE's flavour saves or None). Collective."""
    from megafuse.parallel.quiet import quiet_dependencies

    with quiet_dependencies():
        return [[_look(ckpt, hf, name, saved) for name in layouts] for ckpt, hf, layouts, saved in asked]


def _look(ckpt: Path, hf_dir: Path, name: str, saved: Path | None) -> Flavours:
    from megafuse.checkpoint.state import load_model, model_state, save_state
    from megafuse.config.train import ModelConfig
    from megafuse.converters.direct import load_hf_into
    from megafuse.converters.rungs import differing
    from megafuse.model.arch import read_arch
    from megafuse.model.build import build_model, choose_backend
    from megafuse.parallel.layouts import parse_layout
    from megafuse.parallel.topology import layout

    arch, (parallel, _) = read_arch(ckpt), parse_layout(name)
    settings = ModelConfig(path=ckpt, precision="fp32", layers="torch", attention="sdpa")
    backend = choose_backend(settings, parallel, head_dim=arch.head_dim, prefix_sharing=True)
    with layout(parallel) as topology:
        plain = _shards(model_state(build_model(arch, parallel, topology, backend), topology))
        with te_on_cpu():
            model = build_model(arch, parallel, topology, replace(backend, layers="te"))
            state = model_state(model, topology)
            states = _extra_states(state)
            apart = tuple(sorted(_shards(state) ^ plain, key=str))
            load_hf_into(model, topology, hf_dir)
            compared, direct = differing(model, topology, hf_dir)
            for chunk in model:
                for parameter in chunk.parameters():
                    torch.nn.init.constant_(parameter, float("nan"))
            load_model(model, topology, ckpt)
            _, wrong = differing(model, topology, hf_dir)
            names = {key: tuple(p.shape) for chunk in model for key, p in chunk.named_parameters()}
            if saved is not None:
                topology.on_rank_zero(lambda: saved.mkdir(parents=True))
                content = {"content_metadata": {"singleton_local_shards": False}}
                save_state({**model_state(model, topology), **content}, saved)
                topology.barrier()
    return Flavours(name, names, apart, states, wrong, direct, compared)


def _shards(state: dict[str, Any]) -> set[tuple[Any, ...]]:
    from megafuse.converters.direct import local_tensors

    return {
        (t.key, tuple(t.global_shape), tuple(t.global_offset), tuple(t.local_shape), str(t.dtype))
        for t in local_tensors(state)
    }


def _extra_states(state: dict[str, Any]) -> tuple[str, ...]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return tuple(sorted({v.unique_key for v in nested_values(state) if isinstance(v, ShardedObject)}))
