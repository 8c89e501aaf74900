"""The sharded state dict of a run, and mcore's dist_checkpointing around it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)

from megafuse.checkpoint import relayout
from megafuse.checkpoint.finite import named_tensors, non_finite, shortened
from megafuse.checkpoint.optimizer_state import (
    fill_empty_state,
    is_fused,
    keep_what_is_not_loaded,
    share_whole_parameters,
    steps_on_host,
    unshare_steps,
)
from megafuse.errors import IntegrityError
from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine


def _metadata(topology: Topology) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",  # readable at any layout
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": topology.dp_group,
    }


def model_state(model: list[Any], topology: Topology) -> dict[str, Any]:
    """Sharded state dicts of bare model chunks: {`model`: ...}, or `model0`, `model1` ... of a virtual pipeline.

    These keys are local; what is stored goes by the tensors' own keys, mcore's canonical names.
    """
    return {name: chunk.sharded_state_dict(metadata=_metadata(topology)) for name, chunk in _named(model)}


def _named(model: list[Any]) -> list[tuple[str, Any]]:
    return [("model" if len(model) == 1 else f"model{i}", chunk) for i, chunk in enumerate(model)]


def _load_chunks(model: list[Any], loaded: dict[str, Any]) -> None:
    for name, chunk in _named(model):
        chunk.load_state_dict(loaded[name], strict=True)


def run_state(engine: Engine, topology: Topology, *, optimizer: bool, loading: bool) -> dict[str, Any]:
    """Model, and with `optimizer` also optimizer, schedule and RNG, ready for dist_checkpointing."""
    metadata = _metadata(topology)
    model = model_state(engine.bare, topology)
    state: dict[str, Any] = dict(model)
    state["content_metadata"] = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
    if optimizer:
        fill_empty_state(engine.optimizer)
        share_whole_parameters(engine.optimizer)
        state["optimizer"] = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        steps_on_host(state["optimizer"])
        state["scheduler"] = engine.scheduler.state_dict()
        place, world = topology.rank, topology.world_size
        state["rng"] = ShardedObject("rng_state", rng_state(), (world,), (place,), replica_id=0)
    return state


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write `state` as `torch_dist` into the existing, empty `folder`. Collective."""
    dist_checkpointing.save(state, str(folder), get_default_save_sharded_strategy())


def load_model(model: list[Any], topology: Topology, folder: Path) -> None:
    """Load weights only, from a checkpoint of any layout, imported or trained, or a Hugging Face folder. Collective.

    Raises:
        IntegrityError: the folder holds another model, or weights that are NaN or infinite.
        DataError: its output layer differs from its embedding, and its configuration ties them.
    """
    from megafuse.converters.direct import check_fits, load_hf_into, local_tensors
    from megafuse.converters.folders import open_weights
    from megafuse.converters.importer import refuse_other_head

    if not (folder / ".metadata").is_file():
        topology.on_rank_zero(lambda: refuse_other_head(folder))
        load_hf_into(model, topology, folder)
    else:
        if (folder / "hf" / "config.json").is_file():  # mcore ignores what it has no use for
            with open_weights(folder) as (plan, _):
                tensors = local_tensors(model_state(model, topology))
                check_fits(plan, tensors, tp_size=topology.tp_size, where=str(folder))
        loaded = dist_checkpointing.load(
            model_state(model, topology), str(folder), get_default_load_sharded_strategy(str(folder))
        )
        _load_chunks(model, loaded)
    refuse_non_finite_weights(model, topology, folder)


def refuse_non_finite_weights(model: list[Any], topology: Topology, folder: Path) -> None:
    """Raise IntegrityError where the weights that were loaded from `folder` are not all numbers. Collective."""
    if names := non_finite(named_tensors(model_state(model, topology)), topology):
        raise IntegrityError(
            f"{folder} holds weights that are NaN or infinite: {shortened(names)}; restore it, or take another (of a "
            "run's own checkpoints: remove it, and the run goes on from the one before)"
        )


def load_run(engine: Engine, topology: Topology, folder: Path, *, same_layout: bool) -> None:
    """Restore model, optimizer and schedule, from any layout; the RNG too where the layout is the same. Collective."""
    state = run_state(engine, topology, optimizer=True, loading=True)
    if not same_layout:
        state.pop("rng")
    stored = dist_checkpointing.load_common_state_dict(str(folder))["optimizer"]
    wanted = state.pop("optimizer")
    bf16 = any(p.dtype == torch.bfloat16 for chunk in engine.bare for p in chunk.parameters())
    # under a name of its own: mcore would merge it with the settings stored at another layout
    state["adam"] = relayout.request(wanted, stored, bf16=bf16)
    loaded = dist_checkpointing.load(state, str(folder), get_default_load_sharded_strategy(str(folder)))
    adam = relayout.complete(loaded["adam"], wanted, stored, fused=is_fused(engine.optimizer))
    _load_chunks(engine.bare, loaded)
    refuse_non_finite_weights(engine.bare, topology, folder)
    keep_what_is_not_loaded(engine.optimizer)
    engine.optimizer.load_state_dict(adam)
    unshare_steps(engine.optimizer)
    engine.go_on(loaded["scheduler"])
    if same_layout:
        restore_rng(loaded["rng"])


def rng_state() -> dict[str, Any]:
    """State of every generator that a run could draw from."""
    from megatron.core import tensor_parallel

    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "tensor_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    from megatron.core import tensor_parallel

    kind, keys, place, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tensor_parallel"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
