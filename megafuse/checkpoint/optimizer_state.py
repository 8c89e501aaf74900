"""What megatron-core's optimizer checkpoints need around them, most of it for torch's AdamW.

Each function names the trap that it removes; all were seen with megatron-core 0.16.1 and 0.19.2.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories


def parts(optimizer: Any) -> list[Any]:
    """The optimizers inside a chained optimizer, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_fused(optimizer: Any) -> bool:
    """Transformer Engine's or Apex' Adam, which counts steps in its groups; torch's counts them in its state."""
    return any(type(part.optimizer) not in (torch.optim.Adam, torch.optim.AdamW) for part in parts(optimizer))


def fill_empty_state(optimizer: Any) -> None:
    """Give every parameter AdamW state: `state_dict()` of a fresh distributed optimizer asserts on an empty one."""
    for part in parts(optimizer):
        inner = part.optimizer
        if is_fused(part):
            continue  # mcore fills its state itself
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param].update(
                        step=torch.tensor(0.0, device=_step_device(group, param)),
                        exp_avg=torch.zeros_like(param),
                        exp_avg_sq=torch.zeros_like(param),
                    )


def share_whole_parameters(optimizer: Any) -> None:
    """Make the distributed optimizer find every parameter's state where it is, whatever the padding of its buckets.

    mcore joins the buckets without the padding at their ends, then looks parameters up as if it were there: after the
    first padded bucket, what it stores as `exp_avg` is that of other elements, and zeros at the end (seen in 0.16.1 and
    repaired upstream later, https://github.com/NVIDIA/Megatron-LM/pull/5077). Buckets are padded to a multiple of 128
    and of the data-parallel ranks: any model has that at 24 ranks.
    """
    for part in parts(optimizer):
        if hasattr(part, "sharded_param_state_fully_reshardable"):
            part.sharded_param_state_fully_reshardable = partial(_whole_parameters, part)


def _whole_parameters(
    part: Any, model_state: dict[str, Any], is_loading: bool, metadata: Any
) -> dict[int, dict[str, Any]]:
    """{number in buffer order: {`param`, `exp_avg`, `exp_avg_sq`: sharded like the parameter itself}}. Collective."""
    joined = part.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=is_loading, return_on_all_ranks=True)
    sharded = {tensor.data: tensor for tensor in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    state: dict[int, dict[str, Any]] = {}
    for number, buffer in enumerate(part.buffers):
        ((_, tensors),) = joined[number].items()
        begins = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
        for param, (start, end, bucket) in buffer.param_index_map.items():
            begin = start - buffer.buckets[bucket].offset + begins[bucket]
            like = sharded[param]
            state[len(state)] = {
                name: make_sharded_optimizer_tensor(
                    like, tensors[name][begin : begin + end - start].view(like.data.shape), f"optimizer.state.{name}"
                )
                for name in ("param", "exp_avg", "exp_avg_sq")
            }
    return state


def keep_what_is_not_loaded(optimizer: Any) -> None:
    """Loading `fully_reshardable` state asks for every tensor of a parameter, those that are stored elsewhere too.

    `step` comes with the groups, and fp32 master weights may be views of the model's: they stay as they are.
    """
    for part in parts(optimizer):
        setter = getattr(part, "_set_main_param_and_optimizer_states", None)
        if setter is None or getattr(part, "_megafuse_keeps", False):
            continue

        def keep(param: Any, tensors: dict[str, Any], part: Any = part, setter: Any = setter) -> None:
            group, order = part.model_param_group_index_map[param]
            main = part.optimizer.param_groups[group]["params"][order]
            state = part.optimizer.state[main]
            setter(param, {"param": main, **({"step": state["step"]} if "step" in state else {}), **tensors})

        part._set_main_param_and_optimizer_states = keep
        part._megafuse_keeps = True


def unshare_steps(optimizer: Any) -> None:
    """After loading, all parameters hold the SAME step tensor, which AdamW would advance once per parameter.

    AdamW in one kernel reads it on the parameter's device, wherever the checkpoint had it.
    """
    for part in parts(optimizer):
        for group in part.optimizer.param_groups if part.optimizer else ():
            for param in group["params"]:
                state = part.optimizer.state.get(param, {})
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].to(_step_device(group, param), copy=True)


def steps_on_host(state: dict[Any, Any]) -> None:
    """The step count that parameters have in common, in the sharded `state` of an optimizer, as a host tensor.

    What is not sharded is stored as it is: a tensor of AdamW in one kernel would name the GPU that it was on.
    """
    for part in [state[key] for key in state if isinstance(key, int)] or [state]:
        inner = part.get("optimizer", part).get("state", {})
        if torch.is_tensor(inner.get("common_step")):
            inner["common_step"] = inner["common_step"].cpu()


def _step_device(group: dict[str, Any], param: Any) -> torch.device:
    return param.device if group.get("fused") else torch.device("cpu")
