"""Adam's state from a checkpoint of any layout, distributed optimizer or not, into the optimizer of this one.

Tensors are stored whole under canonical names, so mcore reads them at any layout. The rest of its optimizer state
dict has the shape of the layout that wrote it: one part, or two where expert parallelism sets experts apart, and groups
of parameters marked accordingly. So of that rest only the step count is taken; the settings of the groups follow from
the run's configuration, and the schedule sets rate and weight decay.

With and without the distributed optimizer the moments have the same names, `optimizer.state.exp_avg.X`. The fp32 master
weights of a bf16 run are `optimizer.state.param.X` with it, `optimizer.state.fp32_param.X` without. In an fp32 run they
are the model's own weights, which it stores again and the plain optimizer does not.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

from megafuse.errors import IntegrityError

_DISTRIBUTED, _PLAIN = "optimizer.state.param.", "optimizer.state.fp32_param."
_MARK = "param_state_sharding_type"  # only the distributed optimizer writes it


def request(wanted: dict[Any, Any], stored: dict[Any, Any], *, bf16: bool) -> dict[Any, Any]:
    """`wanted`, this optimizer's sharded state dict, in the names of the checkpoint with the common state `stored`.

    Where an fp32 checkpoint holds no master weights, they are left out: they are views of the model's.
    """
    if _is_distributed(wanted) == _is_distributed(stored):
        return wanted
    if not _is_distributed(wanted):
        _rename(wanted, _PLAIN, _DISTRIBUTED)
    elif bf16:
        _rename(wanted, _DISTRIBUTED, _PLAIN)
    else:
        for part in _parts(wanted):
            for tensors in part["param_state"].values():
                del tensors["param"]
    return wanted


def complete(loaded: dict[Any, Any], wanted: dict[Any, Any], stored: dict[Any, Any], *, fused: bool) -> dict[Any, Any]:
    """`loaded` tensors with the settings of `wanted` and the step count of `stored`: what the optimizer can load.

    fused: the optimizer counts its steps in its groups (see `optimizer_state.is_fused`).
    Raises:
        IntegrityError: the checkpoint has no step count, or several.
    """
    settings, _ = extract_matching_values(wanted, lambda v: not isinstance(v, ShardedBase | LocalNonpersistentObject))
    state: Any = merge(settings, loaded)
    counts = sorted(set(_steps(stored)))
    if len(counts) != 1:
        raise IntegrityError(f"the checkpoint's optimizer has the step counts {counts}, needed is one; restore it")
    for part in _parts(state):
        inner = part.get("optimizer", part)
        if fused or _is_distributed(state):
            for group in inner["param_groups"]:
                group["step"] = int(counts[0])
        else:
            inner["state"]["common_step"] = torch.tensor(counts[0])
    return dict(state)


def _parts(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """State dicts of the chained optimizers (dense parameters, then experts), or the one there is."""
    chained = [state[key] for key in sorted(k for k in state if isinstance(k, int))]
    return chained or [state]


def _is_distributed(state: dict[Any, Any]) -> bool:
    return _MARK in _parts(state)[0]


def _rename(state: dict[Any, Any], before: str, after: str) -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, ShardedBase) and value.key.startswith(before):
            return replace(value, key=after + value.key.removeprefix(before))
        return value

    dict_list_map_inplace(moved, state)


def _steps(state: dict[Any, Any]) -> Iterator[float]:
    """Step counts of every part: in its groups, or common to its parameters."""
    for part in _parts(state):
        inner = part.get("optimizer", part)  # the fp32 optimizer adds nothing around torch's own state dict
        common = inner.get("state", {}).get("common_step")
        counts = [common] if common is not None else [g["step"] for g in inner["param_groups"] if "step" in g]
        yield from (float(count) for count in counts)
