"""Rotary positions: angles at explicit positions, and the attention that turns its queries and keys by them.

megatron-core counts positions 0, 1, 2 ... along a row. A packed row restarts them at every sequence, and with prefix
sharing at every response, so the angles are taken at the positions that the row names. Also megatron-core hard-codes
Llama-3's `original_max_position_embeddings` (8192); here every value of the scaling rule is the model's own.
It takes cosines and sines anew in every layer, for queries and for keys, rounds them to the activations' dtype, and
turns a head in six passes over it. Here they are taken once a row, in fp32, and a head is turned in one pass.
"""

import math
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megafuse.kernels.rope import rotate_heads
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
    """Stands for mcore's `RotaryEmbedding` inside `GPTModel`: for `positions`, which are set before each forward."""

    def __init__(self, arch: ModelArch, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(arch).to(device)  # plain attribute: never cast to bf16, never saved
        self.positions: Tensor | None = None  # [t] int64, of the row that is about to run

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """mcore asks for a length first; the positions say all."""
        return 0

    def forward(self, _: int, **kwargs: Any) -> Tensor:
        """The current row's table for `rotate_heads`: cosines, then sines. [t, 1, 1, head_dim] fp32."""
        assert self.positions is not None
        angles = torch.outer(self.positions.to(torch.float32), self.inv_freq)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None, None, :]


class RowSelfAttention(SelfAttention):
    """mcore's self-attention, whose `rotary_pos_emb` is the table of `RowRotary`."""

    _table: Tensor | None = None  # of the row whose forward is running

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> Any:
        """As mcore's, which turns nothing itself. [t, 1, hidden] -> ([t, 1, hidden], bias)."""
        self._table = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            self._table = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(turned queries [t, 1, h, d], turned keys [t, 1, g, d], values [t, 1, g, d])."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._table is not None, "called by forward"
        return rotate_heads(query, self._table), rotate_heads(key, self._table), value
