"""Optimizer state that was written with the distributed optimizer, read without it, and the other way round.

Both keep Adam's moments under the same keys, `optimizer.state.exp_avg.X`; three things differ. The fp32 master weights
of a bf16 run are `optimizer.state.param.X` with it, `optimizer.state.fp32_param.X` without. In an fp32 run they are the
model's own weights, which it stores again and the plain one does not. And the step count, which all parameters share,
stands in the parameter groups with it, beside the state without.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
)
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

from megafuse.errors import IntegrityError

_DISTRIBUTED, _PLAIN = "optimizer.state.param.", "optimizer.state.fp32_param."
_MARK = "param_state_sharding_type"  # only the distributed optimizer writes it


def crosses(wanted: dict[Any, Any], stored: dict[Any, Any]) -> bool:
    """Exactly one of two optimizer state dicts is a distributed optimizer's."""
    return _is_distributed(wanted) != _is_distributed(stored)


def request(wanted: dict[Any, Any], *, bf16: bool) -> dict[Any, Any]:
    """What to load for `wanted`, this optimizer's sharded state, from a checkpoint of the other kind.

    In an fp32 run the distributed optimizer's master weights are left out: they are views of the model's.
    """
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
    """`loaded` with what is no tensor: the settings of `wanted` (they follow from the run's config) and the step count.

    stored: the optimizer part of the checkpoint's common state. fused: the optimizer counts its steps in its groups.
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
