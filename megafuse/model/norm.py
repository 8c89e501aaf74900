"""RMSNorm with Megatron's constructor, for runs without Transformer Engine."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight, computed in fp32 and returned in the dtype of x. [..., hidden] -> [..., hidden]."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # finalize_model_grads sums the gradients of parameters marked so over the tensor-parallel ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
