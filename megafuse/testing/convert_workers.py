"""What the ranks of the conversion tests do: load with megatron-core, compare every parameter, save at this layout."""

from pathlib import Path
from typing import Any

import torch


def load_compare_save(hf_dir: Path, ckpt: Path, layouts: dict[str, dict[str, Any]], out: Path) -> dict[str, int]:
    """At each layout: load `ckpt`, compare with the rank's own slices of `hf_dir`, save stacked and unstacked to `out`.

    Returns how many parameters were compared at each layout. Raises AssertionError, naming the parameter.
    """
    from megafuse.checkpoint.state import load_model
    from megafuse.config.train import ModelConfig, ParallelConfig
    from megafuse.model.arch import read_arch
    from megafuse.model.build import build_model, choose_backend
    from megafuse.parallel.topology import layout

    counts = {}
    arch = read_arch(ckpt)
    settings = ModelConfig(path=ckpt, precision="bf16")
    backend = choose_backend(settings, head_dim=arch.head_dim, prefix_sharing=True)
    for name, fields in layouts.items():
        parallel = ParallelConfig(**fields)
        with layout(parallel) as topology:
            (model,) = build_model(arch, parallel, topology, backend)
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
            load_model([model], topology, ckpt)
            counts[name] = _compare(model, topology, parallel, hf_dir)
            for kind in ("stacked", "unstacked"):
                _save(model, topology, out / f"{name}-{kind}", unstacked=kind == "unstacked")
    return counts


def work_on_families(climbs: list[tuple[Any, ...]], parities: list[Any], trainings: list[Any]) -> tuple[Any, Any]:
    """Everything that is done to all families in one world: rungs, gradients, training runs.

    climbs: arguments of `converters.rungs.climb`. Returns its answers, and the cells of each ParityConfig.
    """
    from megafuse.converters.rungs import climb
    from megafuse.doctor.parity import parity
    from megafuse.parallel.quiet import quiet_dependencies
    from megafuse.testing.distributed import run_trainings

    with quiet_dependencies():
        facts = [climb(*args) for args in climbs]
        cells = [parity(config) for config in parities]
        run_trainings(trainings)
    return facts, cells


def _compare(model: Any, topology: Any, parallel: Any, hf_dir: Path) -> int:
    """Every parameter against what the rank must hold, cut from the Hugging Face files without mcore."""
    from megafuse.converters.folders import open_weights
    from megafuse.converters.layouts import rank_state_dict
    from megafuse.model.spec import CANONICAL_NAMES

    found = {}
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            for ours, canonical in CANONICAL_NAMES.items():
                name = name.replace(ours, canonical)
            found[name] = tensor
    with open_weights(hf_dir) as (plan, shards):
        want = dict(
            rank_state_dict(
                plan,
                shards,
                tp=parallel.tensor,
                tp_rank=topology.tp_rank,
                pp=parallel.pipeline,
                pp_rank=topology.pp_rank,
                padded_vocab=-(-plan.model.vocab_size // parallel.tensor) * parallel.tensor,
            )
        )
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].cpu(), tensor), name
    return len(want)


def _save(model: Any, topology: Any, folder: Path, *, unstacked: bool) -> None:
    from megatron.core import dist_checkpointing

    if topology.rank == 0:
        folder.mkdir(parents=True)
    topology.barrier()
    content = {"singleton_local_shards": unstacked, "non_homogeneous_layers": unstacked}
    # mcore wants the data-parallel group in what it passes down, and refuses to store it
    state = model.sharded_state_dict(metadata={**content, "dp_cp_group": topology.dp_group})
    dist_checkpointing.save({"model": state}, str(folder), content_metadata=content)
    topology.barrier()
