"""What torch's AdamW needs around megatron-core's optimizer checkpoints (where Transformer Engine's is not there).

Each function names the trap that it removes; all were seen with megatron-core 0.16.1 and 0.19.2.
"""

from typing import Any

import torch


def parts(optimizer: Any) -> list[Any]:
    """The optimizers inside a chained optimizer, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def fill_empty_state(optimizer: Any) -> None:
    """Give every parameter AdamW state: `state_dict()` of a fresh distributed optimizer asserts on an empty one."""
    for part in parts(optimizer):
        inner = part.optimizer
        if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
            continue  # fused optimizers keep their step elsewhere, and mcore fills their state itself
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param].update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
                    )


def keep_step_while_loading(optimizer: Any) -> None:
    """Loading `fully_reshardable` state replaces a parameter's state by tensors without `step`: put it back."""
    for part in parts(optimizer):
        setter = getattr(part, "_set_main_param_and_optimizer_states", None)
        if setter is None or getattr(part, "_megafuse_keeps_step", False):
            continue

        def keep(param: Any, tensors: dict[str, Any], part: Any = part, setter: Any = setter) -> None:
            group, order = part.model_param_group_index_map[param]
            state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
            setter(param, {**({"step": state["step"]} if "step" in state else {}), **tensors})

        part._set_main_param_and_optimizer_states = keep
        part._megafuse_keeps_step = True


def unshare_steps(optimizer: Any) -> None:
    """After loading, all parameters hold the SAME step tensor, which AdamW would advance once per parameter."""
    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
