"""All losses of `megafuse.losses` on response sums as fused Triton kernels: same results, same arguments.

    if fused_losses_run_on(sums.logps): losses, metrics = fused_loss("dpo", sums, terms, beta=0.1)

Three launches forward (terms, groups and metrics, entropy), one backward, instead of some eighty small ones; no host
synchronisation. Arithmetic is float64, rounded to float32 once. What the torch losses refuse with ValueError after
looking at device memory (a term without its members, a group out of range) gives NaN losses here, which the training
step refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafuse.kernels.backend import choose, on_device

if TYPE_CHECKING:  # the kernels know the losses' types by shape only
    from megafuse.losses.types import LossOutput, ResponseSums, Terms

_PREFERENCE = (
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logps",
    "rejected_logps",
    "chosen_logps_per_token",
    "rejected_logps_per_token",
    "margin",
    "accuracy",
    "reward_margin",
)
_KL = ("kl", "kl_per_token")
_BLOCK = 64  # terms of one program
_MAX_LOG_RATIO = 20.0  # as in megafuse.losses.rloo


def fused_losses_run_on(logps: Tensor, backend: str = "auto") -> bool:
    """Whether `fused_loss` is the implementation to use for these response sums [n]. Errors: see `backend.choose`."""
    return choose(backend, logps.device, logps.dtype) == "triton"


def fused_loss(name: str, sums: ResponseSums, terms: Terms, **settings: Any) -> LossOutput:
    """`megafuse.losses.NAME(sums, terms, **settings)`: (loss_per_group [g] float32, metrics).

    `sums.logps [n]` float32 gets a gradient, nothing else does. Raises ValueError for a loss, a surrogate, a reduction
    or a width of `terms.members` that is not known, and without the reference log-probs that a loss needs.
    """
    if name not in _LOSSES:
        raise ValueError(f"loss = {name!r}: choose one of {', '.join(_LOSSES)}")
    launch, names = _LOSSES[name](sums, terms, **settings)
    losses, values, entropy = _Fused.apply(sums.logps, terms, len(names), launch)
    metrics = dict(zip(names, values.unbind(0)))
    metrics.pop("", None)  # a metric that this call does not have
    if terms.counted is not None:
        entropy = torch.stack((entropy[:, 0], entropy[:, 1] * terms.counted), 1)
    metrics["weight_entropy"] = entropy.sum(0)
    if name == "wrpo":
        weight = values[0, 1]
        metrics["alpha"] = torch.stack((settings["alpha"] * weight, weight))
    return losses, metrics


_Launch = Callable[[Tensor, Tensor, Tensor], None]  # fills loss [m], coef [m, k], values [Q, m]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor, terms: Terms, count: int, launch: _Launch) -> tuple[Tensor, Tensor, Tensor]:
        from megafuse.kernels._triton_heads import reduce_terms

        members, groups = terms.members.contiguous(), terms.num_groups
        m = members.shape[0]
        losses = torch.empty(groups, dtype=torch.float32, device=logps.device)
        loss = torch.empty(m, dtype=torch.float64, device=logps.device)
        coef, values = loss.new_empty(members.shape), loss.new_empty(count, m)
        entropy, metrics = loss.new_empty(groups, 2), loss.new_empty(count, 2)
        group = terms.group.contiguous()
        with on_device(logps):
            if m:
                launch(loss, coef, values)
            reduce_terms[(groups + count,)](
                loss, values, terms.weights.contiguous(), group, m, groups, losses, entropy, metrics, BLOCK=_BLOCK
            )
        ctx.save_for_backward(members, group, coef)
        ctx.responses, ctx.groups = logps.shape[0], groups
        ctx.mark_non_differentiable(metrics, entropy)
        return losses, metrics, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _metrics: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        from megafuse.kernels._triton_heads import sums_gradient

        members, group, coef = ctx.saved_tensors
        out = torch.empty(ctx.responses, dtype=torch.float32, device=grad.device)
        with on_device(out):
            if ctx.responses:
                sums_gradient[(ctx.responses,)](
                    *(members, group, coef, grad.contiguous(), out),
                    *(members.numel(), members.shape[1], ctx.groups),
                    BLOCK=_BLOCK,
                )
        return out, None, None, None


def _grid(terms: Terms) -> tuple[int]:
    return (-(-terms.members.shape[0] // _BLOCK),)


def _needs_reference(sums: ResponseSums) -> Tensor:
    if sums.ref_logps is None:
        raise ValueError("ref_logps is None: this loss needs the reference log-probs of every response")
    return sums.ref_logps.contiguous()


def _check_width(terms: Terms, name: str, width: int) -> None:
    if terms.members.shape[0] and terms.members.shape[1] != width:
        shape = tuple(terms.members.shape)
        raise ValueError(f"{name} needs members [m, {width}], got {shape}: is the data set of its kind?")


def _pair(
    name: str,
    sums: ResponseSums,
    terms: Terms,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    alpha: float | None = None,
) -> tuple[_Launch, tuple[str, ...]]:
    _check_width(terms, name, 2 if alpha is None else 3)
    use_ref = name != "simpo"
    refs = _needs_reference(sums) if use_ref or sums.ref_logps is not None else None

    def launch(loss: Tensor, coef: Tensor, values: Tensor) -> None:
        from megafuse.kernels._triton_heads import terms_pair

        terms_pair[_grid(terms)](
            *(sums.logps.detach().contiguous(), refs if refs is not None else sums.logps.detach()),
            *(sums.lengths.contiguous(), sums.rewards.contiguous(), terms.members.contiguous()),
            *(terms.weights.contiguous(), loss, coef, values, loss.numel()),
            *(float(beta), float(gamma), float(label_smoothing), float(alpha or 0.0)),
            HAS_REF=refs is not None,
            USE_REF=use_ref,
            PER_TOKEN=name in ("ln_dpo", "simpo"),
            TRIPLE=alpha is not None,
            BLOCK=_BLOCK,
        )

    return launch, _PREFERENCE + (_KL if refs is not None else ())


def _dpo(s: ResponseSums, t: Terms, *, beta: float, label_smoothing: float = 0.0) -> Any:
    return _pair("dpo", s, t, beta=beta, label_smoothing=label_smoothing)


def _ln_dpo(s: ResponseSums, t: Terms, *, beta: float, label_smoothing: float = 0.0) -> Any:
    return _pair("ln_dpo", s, t, beta=beta, label_smoothing=label_smoothing)


def _simpo(s: ResponseSums, t: Terms, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Any:
    return _pair("simpo", s, t, beta=beta, gamma=gamma, label_smoothing=label_smoothing)


def _wrpo(s: ResponseSums, t: Terms, *, beta: float, alpha: float, label_smoothing: float = 0.0) -> Any:
    return _pair("wrpo", s, t, beta=beta, alpha=alpha, label_smoothing=label_smoothing)


def _sft(sums: ResponseSums, terms: Terms, *, reduction: str = "sequence_mean") -> tuple[_Launch, tuple[str, ...]]:
    known = ("sequence_mean", "sequence_sum", "token_mean")
    if reduction not in known:
        raise ValueError(f"sft: reduction = {reduction!r}: choose one of {', '.join(known)}")
    _check_width(terms, "sft", 1)

    def launch(loss: Tensor, coef: Tensor, values: Tensor) -> None:
        from megafuse.kernels._triton_heads import terms_sft

        terms_sft[_grid(terms)](
            *(sums.logps.detach().contiguous(), sums.lengths.contiguous(), terms.members.contiguous()),
            *(terms.weights.contiguous(), loss, coef, values, loss.numel()),
            PER_TOKEN=reduction == "sequence_mean",
            BLOCK=_BLOCK,
        )

    return launch, ("nll", "nll_per_token")


def _rloo(
    sums: ResponseSums, terms: Terms, *, beta_kl: float, surrogate: str = "reinforce", clip: float = 0.2
) -> tuple[_Launch, tuple[str, ...]]:
    known = ("reinforce", "clipped_ratio")
    if surrogate not in known:
        raise ValueError(f"rloo: surrogate = {surrogate!r}: choose one of {', '.join(known)}")
    free = sums.ref_logps is None and beta_kl == 0 and surrogate == "reinforce"
    refs = None if free else _needs_reference(sums)
    width = terms.members.shape[1]
    slots = 1 << max(width - 1, 0).bit_length()

    def launch(loss: Tensor, coef: Tensor, values: Tensor) -> None:
        from megafuse.kernels._triton_heads import terms_rloo

        terms_rloo[_grid(terms)](
            *(sums.logps.detach().contiguous(), refs if refs is not None else sums.logps.detach()),
            *(sums.lengths.contiguous(), sums.rewards.contiguous(), terms.members.contiguous()),
            *(terms.weights.contiguous(), loss, coef, values, loss.numel(), width),
            *(float(beta_kl), float(clip), _MAX_LOG_RATIO),
            HAS_REF=refs is not None,
            CLIPPED=surrogate == "clipped_ratio",
            K=slots,
            BLOCK=_BLOCK,
        )

    clipped = "clip_fraction" if surrogate == "clipped_ratio" else ""
    names = (*_PREFERENCE, "advantage_abs", "rewards", clipped)
    return launch, names + (_KL if refs is not None else ())


_LOSSES: dict[str, Callable[..., tuple[_Launch, tuple[str, ...]]]] = {
    "sft": _sft,
    "dpo": _dpo,
    "ln_dpo": _ln_dpo,
    "simpo": _simpo,
    "rloo": _rloo,
    "wrpo": _wrpo,
}
