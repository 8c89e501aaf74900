"""RMSNorm with Megatron's constructor, for runs without Transformer Engine; linear modules with a norm behind them."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight, computed in fp32 and returned in the dtype of x. [..., hidden] -> [..., hidden].

    Where the configuration says `layernorm_zero_centered_gamma`, the factor is 1 + weight.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.centre = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones - self.centre)
        # finalize_model_grads sums the gradients of parameters marked so over the tensor-parallel ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not x.is_cuda:
            normed: Tensor = _LeanNorm.apply(x, self.weight, self.centre, self.eps)
            return normed
        if not self.centre and x.dtype == self.weight.dtype:  # one kernel, fp32 inside, which keeps x as it is
            return rms_norm(x, self.weight.shape, self.weight, self.eps)
        factor = self.weight.float() + self.centre  # in fp32: bf16 would round 1 + weight to 8 bits
        return rms_norm(x.float(), self.weight.shape, factor, self.eps).to(x.dtype)


class _LeanNorm(torch.autograd.Function):
    """torch's rms_norm in the bits of its forward; what it keeps for backward is x, and a number for each row of it.

    Where torch has no kernel of its own it keeps x and the normalised x in fp32: two more copies of a bf16 row, one
    more of an fp32 row, for every norm of every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, centre: float, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        ctx.centre = centre
        return (wide * scale * (weight.float() + centre)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * scale
        inner = grad * (weight.float() + ctx.centre)
        of_x = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale
        of_weight = (grad * normed).flatten(0, -2).sum(0)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None


@functools.cache  # one class for all layers
def normed(linear: type, norm: Any) -> type:
    """The row-parallel linear module `linear` with a norm behind it (`post_layernorm`), as Gemma 2 has them.

    Its epsilon is the configuration's: mcore's own default would be another. What it answers: (normed output, bias),
    the bias None, in the places of `linear`'s: under sequence parallelism each rank norms its part of the row.
    """

    class NormedLinear(linear):
        def __init__(self, input_size: int, output_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, *args, config=config, **kwargs)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(*args, **kwargs)
            return self.post_layernorm(output), bias

    NormedLinear.__name__ = f"Normed{linear.__name__}"
    return NormedLinear
