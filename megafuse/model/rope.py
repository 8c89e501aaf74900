"""Rotary angles at explicit positions.

megatron-core counts positions 0, 1, 2 ... along a row. A packed row restarts them at every sequence, and with prefix
sharing at every response, so the angles are taken at the positions that the row names. Also megatron-core hard-codes
Llama-3's `original_max_position_embeddings` (8192); here every value of the scaling rule is the model's own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megafuse.model.arch import ModelArch


def inverse_frequencies(arch: ModelArch) -> Tensor:
    """theta^(-2i/d), with Llama-3's wavelength-dependent scaling where the model has it. [head_dim / 2] fp32."""
    exponent = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    freq = 1.0 / (arch.rope_theta**exponent)
    rule = arch.rope_scaling
    if rule is None:
        return freq
    wavelength = 2 * math.pi / freq
    longest = rule.original_max_position_embeddings / rule.low_freq_factor
    shortest = rule.original_max_position_embeddings / rule.high_freq_factor
    blend = (rule.original_max_position_embeddings / wavelength - rule.low_freq_factor) / (
        rule.high_freq_factor - rule.low_freq_factor
    )
    mixed = (1 - blend) * freq / rule.factor + blend * freq
    scaled = torch.where(wavelength > longest, freq / rule.factor, freq)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), mixed, scaled)


class RowRotary(torch.nn.Module):
    """Stands for mcore's `RotaryEmbedding` inside `GPTModel`: angles at `positions`, set before each forward."""

    def __init__(self, arch: ModelArch, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(arch).to(device)  # plain attribute: never cast to bf16, never saved
        self.positions: Tensor | None = None  # [t] int64, of the row that is about to run

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """mcore asks for a length first; the positions say all."""
        return 0

    def forward(self, _: int, **kwargs: Any) -> Tensor:
        """Angles of the current row. [t, 1, 1, head_dim] fp32."""
        assert self.positions is not None
        angles = torch.outer(self.positions.to(torch.float32), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
