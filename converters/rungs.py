"""What the ranks of a verification do at each layout: load with megatron-core, compare, save again, compute logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.converters.direct import fill, load_hf_into, local_tensors
from megafuse.converters.folders import open_weights
from megafuse.converters.logits import LogitsReport, compare, mcore_logits
from megafuse.model.arch import read_arch
from megafuse.parallel.layouts import parse_layout
from megafuse.parallel.topology import Topology


@dataclass(frozen=True)
class LayoutFacts:
    """What one rank found at one layout.

    Attributes:
        layout: its name, as `parallel.layouts.parse_layout` reads it.
        compared: parameters that were compared with the Hugging Face folder.
        wrong: names of those that differ after megatron-core loaded the checkpoint.
        direct: names of those that differ after the folder was loaded without a checkpoint.
        logits: on the rank that holds the LM head; None where they were not asked for.
    """

    layout: str
    compared: int
    wrong: tuple[str, ...]
    direct: tuple[str, ...]
    logits: LogitsReport | None


def climb(
    ckpt: Path, hf_dir: Path, layouts: list[str], ids: list[int] | None, theirs: Path | None, saved: Path | None
) -> list[LayoutFacts]:
    """Every layout in turn, in the joined world. Collective.

    ids: token ids whose logits are compared with the tensor in the file `theirs`; None: no logits.
    saved: a folder for a checkpoint of each layout, by its name; None: none are written.
    """
    arch, found = read_arch(ckpt), []
    for name in layouts:
        parallel, _ = parse_layout(name)
        found.append(_at_layout(arch, name, parallel, ckpt, hf_dir, ids, theirs, saved))
    return found


def _at_layout(
    arch: Any,
    name: str,
    parallel: ParallelConfig,
    ckpt: Path,
    hf_dir: Path,
    ids: list[int] | None,
    theirs: Path | None,
    saved: Path | None,
) -> LayoutFacts:
    from megafuse.checkpoint.state import load_model
    from megafuse.model.build import build_model, choose_backend
    from megafuse.parallel.topology import layout

    settings = ModelConfig(path=ckpt, precision="fp32", attention="sdpa")
    backend = choose_backend(settings, parallel, head_dim=arch.head_dim, prefix_sharing=True)
    with layout(parallel) as topology:
        model = build_model(arch, parallel, topology, backend)
        _forget(model)
        load_hf_into(model, topology, hf_dir)
        compared, direct = differing(model, topology, hf_dir)
        _forget(model)
        load_model(model, topology, ckpt)
        _, wrong = differing(model, topology, hf_dir)
        report = None
        if not topology.all_agree(not wrong and not direct):
            return LayoutFacts(name, compared, wrong, direct, report)  # the other rungs would say nothing new
        if ids is not None and theirs is not None:
            ours = mcore_logits(model, topology, arch, parallel, torch.tensor(ids))
            if ours is not None and topology.is_reporter:
                report = compare(ours, torch.load(theirs), len(ids))
        if saved is not None:
            _save(model, topology, saved / name, ckpt)
        return LayoutFacts(name, compared, wrong, direct, report)


def _forget(model: list[Any]) -> None:
    for chunk in model:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))


def differing(model: list[Any], topology: Topology, hf_dir: Path) -> tuple[int, tuple[str, ...]]:
    """(parameters compared, names of those that are not what the Hugging Face folder says this rank holds)."""
    from megafuse.checkpoint.state import model_state

    wrong, tensors = [], local_tensors(model_state(model, topology))
    with open_weights(hf_dir) as (plan, view):
        for tensor in tensors:
            wanted = torch.full_like(tensor.data, float("nan"))
            fill(wanted, plan, view, tensor.key, tensor.global_offset)
            if not torch.equal(wanted, tensor.data):
                wrong.append(f"{tensor.key} {list(tensor.global_offset)}")
    return len(tensors), tuple(wrong)


def _save(model: list[Any], topology: Topology, folder: Path, ckpt: Path) -> None:
    """The weights as the checkpoint stores them, saved by megatron-core from this layout."""
    from megafuse.checkpoint.state import model_state, save_state

    with open_weights(ckpt) as (plan, view):
        dtypes = {packed.key: view.dtype(packed.pieces[0].hf) for packed in plan.tensors.values()}
    state = model_state(model, topology)
    _cast(state, dtypes)
    topology.on_rank_zero(lambda: folder.mkdir(parents=True))
    save_state({**state, "content_metadata": {"singleton_local_shards": False}}, folder)
    topology.barrier()


def _cast(state: dict[str, Any], dtypes: dict[str, str]) -> None:
    """Give every tensor the dtype that the checkpoint stores it in; the model itself stays as it is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megafuse.converters.views import TORCH_DTYPES

    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and isinstance(value.data, Tensor):
            dtype = TORCH_DTYPES[dtypes[value.key]]
            value.data = value.data.detach().to(dtype)
            if isinstance(value, ShardedTensor):
                value.dtype = dtype
