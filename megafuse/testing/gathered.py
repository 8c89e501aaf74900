"""The whole state of a run, gathered from every rank under canonical names: what two layouts have to agree on."""

import gc
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.checkpoint.folder import complete_steps, step_name
from megafuse.config.train import TrainConfig

_BITS = {2: "int16", 4: "int32"}
# Where the three optimizers keep what Adam updates; the plain one of an fp32 run updates the model itself.
_MASTER = ("optimizer.state.param.", "optimizer.state.fp32_param.")


@dataclass(frozen=True)
class Job:
    """One start of `train`: a new run, or one that goes on from checkpoint `step` of the run folder `source`."""

    config: TrainConfig
    source: Path | None = None
    step: int = 0


@dataclass
class Seen:
    """What one start of `train` had before its LAST optimizer step, and the batches of all its steps."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """Whole tensors by name, as bits (int16 of bf16, int32 of fp32): `model.X`, `master.X`, `exp_avg.X`, ..."""
    steps: set[float] = field(default_factory=set)
    """Adam's step counts of all parameters of all ranks."""
    groups: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict)
    """Parameter group (multipliers of weight decay and rate) -> rate, weight decay, betas, eps."""
    batches: list[list[int]] = field(default_factory=list)
    """Groups of each optimizer step over all data-parallel ranks, sorted; each as often as it was computed."""
    problems: list[str] = field(default_factory=list)
    """Where ranks that hold copies of one thing disagree, and what no rank holds."""


def train_and_look(jobs: Sequence[Job]) -> list[Seen] | None:
    """Run `jobs` one after the other in the joined world; what was seen, on rank 0. A job may go on from an earlier."""
    import torch.distributed as dist

    from megafuse.training import run  # noqa: F401 (all that is imported is frozen next)

    gc.freeze()  # mcore collects garbage in every save: half of the time, were it to look at all modules each time
    try:
        seen = [_train(job) for job in jobs]
    finally:
        gc.unfreeze()
    return seen if dist.get_rank() == 0 else None


def _train(job: Job) -> Seen:
    import torch.distributed as dist

    from megafuse.training import loop
    from megafuse.training import run as training_run

    seen, last = Seen(), job.config.max_steps or 0
    if job.source is not None and dist.get_rank() == 0:
        branch(job.source, job.step, job.config.run_dir)
    dist.barrier()
    original = loop.train_step

    def looking(engine: Any, topology: Any, loss: Any, rows: Any, **kwargs: Any) -> Any:
        mine = [part.group for item in rows for part in item.row.parts if part.responses[0] == 0]
        reports = _from_all(mine if topology.tp_rank == topology.cp_rank == topology.pp_rank == 0 else [])
        seen.batches.append(sorted(g for report in reports for g in report))
        if job.step + len(seen.batches) == last:
            _look(engine, topology, seen)
        return original(engine, topology, loss, rows, **kwargs)

    loop.train_step = looking
    try:
        training_run.train(job.config)
    finally:
        loop.train_step = original
    return seen


def branch(source: Path, step: int, target: Path) -> None:
    """Copy the run folder `source` as if it had been killed after its checkpoint `step`. One process only."""
    shutil.copytree(source, target)
    for later in complete_steps(target / "checkpoints"):
        if later > step:
            shutil.rmtree(target / "checkpoints" / step_name(later))


def _look(engine: Any, topology: Any, seen: Seen) -> None:
    from megafuse.checkpoint.optimizer_state import parts
    from megafuse.checkpoint.state import run_state

    state = run_state(engine, topology, optimizer=True, loading=False)
    pieces = [_piece(tensor) for tensor in _sharded_tensors(state)]
    inner = [part.optimizer for part in parts(engine.optimizer)]
    counts = [s["step"] for optimizer in inner for s in optimizer.state.values() if "step" in s]
    if len({id(count) for count in counts}) < len(counts):
        seen.problems.append("parameters share a step count, which Adam would advance once for each")
    steps = {float(count) for count in counts}
    settings = ("lr", "weight_decay", "betas", "eps")
    groups = {
        tuple(g[key] for key in ("wd_mult", "lr_mult")): tuple(g[key] for key in settings)
        for optimizer in inner
        for g in optimizer.param_groups
    }
    gathered = _from_all((pieces, steps, groups))
    for _, their_steps, their_groups in gathered:
        seen.steps |= their_steps
        for key, value in their_groups.items():
            if seen.groups.setdefault(key, value) != value:
                seen.problems.append(f"parameter group {key}: {value} and {seen.groups[key]}")
    seen.tensors = _assemble([piece for pieces, _, _ in gathered for piece in pieces], seen.problems)


def _sharded_tensors(state: dict[str, Any]) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):  # gate and up of an MLP, which are cut apart
            built = value.build()
            yield from _sharded_tensors(built if isinstance(built, dict) else {"": built})


def _piece(tensor: Any) -> tuple[str, tuple[int, ...], tuple[Any, ...], np.ndarray]:
    """(canonical name, global shape, where, bits) of this rank's part of a tensor."""
    import torch

    key = tensor.key
    name = next((f"master.{key.removeprefix(p)}" for p in _MASTER if key.startswith(p)), None)
    if name is None:
        name = key.removeprefix("optimizer.state.") if key.startswith("optimizer.state.") else f"model.{key}"
    data = tensor.data.detach().contiguous()
    bits = data.view(getattr(torch, _BITS[data.element_size()])).cpu().numpy().copy()
    return name, tuple(tensor.global_shape), tensor.global_slice(), bits


def _assemble(
    pieces: list[tuple[str, tuple[int, ...], tuple[Any, ...], np.ndarray]], problems: list[str]
) -> dict[str, np.ndarray]:
    """Whole tensors; adds to `problems`."""
    whole: dict[str, np.ndarray] = {}
    known: dict[str, np.ndarray] = {}
    for name, shape, where, bits in pieces:
        if name not in whole:
            whole[name], known[name] = np.zeros(shape, bits.dtype), np.zeros(shape, bool)
        twice, before = known[name][where], whole[name][where]
        if whole[name].shape != shape or not np.array_equal(before[twice], bits[twice]):
            problems.append(f"copies of {name} at {where} of {shape} differ")
            continue
        whole[name][where] = bits
        known[name][where] = True
    problems += [f"no rank holds all of {name}" for name, places in known.items() if not places.all()]
    for name in [n for n in whole if n.startswith("model.") and f"exp_avg.{n.removeprefix('model.')}" in whole]:
        whole.setdefault(f"master.{name.removeprefix('model.')}", whole[name])
    return whole


def _from_all(value: Any) -> list[Any]:
    """The picklable `value` of every rank, by rank."""
    import torch.distributed as dist

    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def different(one: Seen, other: Seen) -> list[str]:
    """Names of the tensors that are not bit-equal or not in both. Rows that pad a vocabulary must be zeros."""
    names = sorted(one.tensors.keys() | other.tensors.keys())
    return [name for name in names if not _same(one.tensors.get(name), other.tensors.get(name))]


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        return False
    rows = min(len(one), len(other))
    return np.array_equal(one[:rows], other[:rows]) and not one[rows:].any() and not other[rows:].any()
