"""Autograd over `HeadRows` of any backend: log-probs with a gradient, and a value whose gradient is already known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.errors import ConfigError
from megafuse.kernels._linear_parts import (
    HeadRows,
    HiddenGradient,
    LinearOptions,
    WeightGradient,
    Workspace,
    nonzero_on_host,
    whole_sequence,
)
from megafuse.kernels._vocab_softmax import compute_dtype


def rows_of(backend: str) -> type[HeadRows]:
    """The implementation of `HeadRows` that `backend.choose` named."""
    if backend == "triton":
        from megafuse.kernels._linear_triton import TritonRows

        return TritonRows
    from megafuse.kernels._logprob_torch import TorchRows

    return TorchRows


def hidden_gradient(hidden: Tensor, options: LinearOptions) -> HiddenGradient:
    """Where d loss / d hidden is collected: in float32 where ranks are to be added."""
    wide = compute_dtype(hidden) if options.head.group is not None else None
    return HiddenGradient(hidden, options, hidden.shape[0], wide)


class LinearLogprobs(torch.autograd.Function):
    """(log-probs [T], entropies [T] or [0]) from hidden [T_h, H] and weight [V_local, H]. The entropy has no gradient:
    a backward that reaches it is refused, instead of a term of the loss without effect.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions, kind: type[HeadRows]
    ) -> tuple[Tensor, Tensor]:
        rows = kind(whole_sequence(hidden, options), weight, targets, options, Workspace())
        logp, entropy = rows.logprobs()
        # Without a backward (no_grad, frozen inputs) autograd drops ctx, and all of `rows` with it, on return.
        ctx.save_for_backward(hidden, weight)
        ctx.rows, ctx.options = rows, options
        ctx.set_materialize_grads(False)
        if not options.entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_entropy is not None:
            raise ConfigError("the entropy of linear_logprobs_and_entropy has no gradient: use entropy.detach()")
        if grad is None:
            return None, None, None, None, None
        hidden, weight = ctx.saved_tensors
        options, rows = ctx.options, ctx.rows
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = hidden_gradient(hidden, options) if need_x else None
        dw = WeightGradient(weight, options.head.columns, rows.parts, options.main_grad) if need_w else None
        rows.gradients(
            *(grad, None if dx is None else dx.local, dw),
            then=_nothing
            if dx is None
            else dx.start,  # the ranks' parts travel while the weight's gradient is computed
            keep=nonzero_on_host(grad),
        )
        return dx.finish() if dx is not None else None, dw.result() if dw is not None else None, None, None, None


def _nothing() -> None:
    """No gradient of the hidden states is wanted."""


class GivenGradient(torch.autograd.Function):
    """`value []`, whose gradients by hidden and weight were computed with it: `dx`, and `dw` or what main_grad has got.

    A gradient `g` that comes from above multiplies both. What was added to `main_grad` cannot be multiplied any more:
    there g must be 1 and backward must run once. Otherwise ConfigError on a CPU; on CUDA, where looking would stop the
    device, a g that is not 1 makes the gradient NaN, which the training step refuses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        value: Tensor,
        dx: Tensor | None,
        dw: Tensor | None,
        added: WeightGradient | None,
    ) -> Tensor:
        ctx.save_for_backward(dx, dw)
        ctx.added, ctx.used = added, False
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        if ctx.added is not None:
            if ctx.used:
                raise ConfigError("a second backward: main_grad has this gradient already; use accumulate='grad'")
            if grad.device.type == "cpu" and float(grad) != 1:
                raise ConfigError(
                    f"the gradient from above is {float(grad)}, but main_grad was given that of the loss itself: scale "
                    f"the loss inside the function that linear_group_loss calls, or use accumulate='grad'"
                )
            ctx.used = True
            grad = torch.where(grad == 1, 1.0, torch.nan).to(grad.dtype)
            dw = ctx.added.result()
        elif dw is not None:
            dw = dw * grad
        return None if dx is None else dx * grad, dw, None, None, None, None
