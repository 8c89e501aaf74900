"""DDP, AdamW and the learning-rate schedule, all megatron-core's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megafuse.config.train import OptimConfig
from megafuse.parallel.host_memory import give_back_freed_memory
from megafuse.parallel.policy import Policy
from megafuse.parallel.topology import has_gloo_groups


@dataclass(frozen=True)
class Engine:
    """What an optimizer step works on."""

    model: list[Any]  # DistributedDataParallel around each FusionGPT chunk of this rank
    optimizer: Any  # megatron-core optimizer
    scheduler: OptimizerParamScheduler
    clip_grad: float

    @property
    def bare(self) -> list[Any]:
        """The FusionGPT chunks without wrappers."""
        return [chunk.module for chunk in self.model]

    def sync_params(self) -> None:
        """Bring every parameter up to date, where the last update is still to be gathered by the next forward."""
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    @property
    def lr(self) -> float:
        """Learning rate of the coming update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def go_on(self, stored: Mapping[str, Any]) -> None:
        """Take from `stored`, the schedule's state in a checkpoint, the number of updates made so far, and no more.

        The rest follows from this start's configuration, which may ask for another rate, decay or length than the one
        that wrote the checkpoint (`allow_change`). megatron-core's own loading goes on with the old ones, or refuses.
        """
        updates = int(stored["num_steps"]) - _shift(stored["lr_warmup_steps"])
        self.scheduler.num_steps = 0
        self.scheduler.step(updates + _shift(self.scheduler.lr_warmup_steps))

    def clip(self, grad_norm: float) -> None:
        """Scale gradients whose global norm is `grad_norm` down to the limit."""
        if self.clip_grad <= 0:
            return
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            params = part.get_parameters()
            if params:
                clip_grad_by_total_norm_fp32(params, self.clip_grad, grad_norm)


def wrap_for_training(model: list[Any], config: OptimConfig, policy: Policy, *, total_steps: int) -> Engine:
    """Put the chunks of `model` under DDP with one optimizer and a schedule of `total_steps` optimizer steps."""
    core = get_model_config(model[0])
    bf16 = core.params_dtype == torch.bfloat16
    ddp = [
        DistributedDataParallel(
            core,
            DistributedDataParallelConfig(
                use_distributed_optimizer=config.distributed,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=policy.overlap_grad_reduce,
                overlap_param_gather=policy.overlap_param_gather,
                average_in_collective=False,  # gradients are summed: the loss already carries the global denominator
            ),
            chunk,
            # mcore's advice: the first chunk's backward is the last, so only its buckets have anything to hide behind
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(model)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=config.distributed,
        ),
        ddp,
        use_gloo_process_groups=has_gloo_groups(),  # by name: its place differs between versions of mcore
    )
    use_one_kernel(optimizer, wanted=torch.cuda.is_available())
    core.finalize_model_grads_func = _finalize
    core.grad_scale_func = None
    core.no_sync_func = None
    if policy.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in ddp]
        core.no_sync_func = no_sync if len(ddp) > 1 else no_sync[0]
    give_back_freed_memory()  # the parameters' first copies, and what the reference pass left
    return Engine(ddp, optimizer, _schedule(optimizer, config, total_steps), config.clip_grad)


def use_one_kernel(optimizer: Any, *, wanted: bool) -> None:
    """Let torch's AdamW update a parameter in one pass instead of about twelve over it, as TE's and Apex' always do.

    megatron-core has no setting for it. Not for CPUs: there the one kernel rounds an element otherwise at the end of a
    tensor than in the middle, so that the bits of an update would depend on how the optimizer is sharded.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(part.optimizer) is torch.optim.AdamW:
            for group in part.optimizer.param_groups:
                group["fused"] = True if wanted else None


def _finalize(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """All-reduce gradients; the token count is dropped because the loss was divided by its exact denominator."""
    give_back_freed_memory()  # the activations: gloo's copies of gradients and parameters, and Adam's come now
    finalize_model_grads(model, None, **kwargs)


def _schedule(optimizer: Any, config: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then decay to `min_lr` at the last step. One unit is one optimizer step.

    mcore's scheduler is needed even for a constant rate: torch's AdamW does not know `wd_mult`, so without it norms
    would be decayed. The first update already has a positive rate (1/warm-up of the peak), not the zero of step 0, and
    the last one is one step short of `min_lr`: no update is wasted on a rate of zero.
    """
    warmup = round(config.warmup_ratio * total_steps)
    shift = _shift(warmup)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr if config.schedule == "constant" else config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, warmup) + shift,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    scheduler.step(shift)
    return scheduler


def _shift(warmup: int) -> int:
    """Units that the schedule is ahead of the updates: see `_schedule`."""
    return 1 if warmup else 0
