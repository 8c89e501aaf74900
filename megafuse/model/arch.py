"""What a model is: the frozen record between a Hugging Face `config.json` and the model builder.

Nothing here knows a layout, a runtime or a weight. `read_arch` is the one way in: it goes through the allow-list of
`megafuse.converters.hf_config`, so every number below was understood, not defaulted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

NOT_IN_NUMBERS = ("torch_dtype", "max_position_embeddings")
"""Fields of a ModelArch that change no number that the model computes."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings (`rope_type: llama3`), any values.

    With wavelength w = 2 pi / inv_freq: w < original/high keeps inv_freq, w > original/low divides it by `factor`,
    between them it is interpolated in original/w. megatron-core hard-codes low 1, high 4 and original 8192; the model
    builder, not this record, has to deal with that.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelArch:
    """A decoder-only model: RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.

    Linear layers have no bias, except the query, key and value projections where `qkv_bias` says so.

    Shapes that follow from the fields (HF names, [out, in]): q_proj [num_heads * head_dim, hidden_size], k_proj and
    v_proj [num_kv_heads * head_dim, hidden_size], o_proj [hidden_size, num_heads * head_dim], gate_proj and up_proj
    [ffn_hidden_size, hidden_size], down_proj [hidden_size, ffn_hidden_size], embed_tokens [vocab_size, hidden_size].
    With experts every layer has a router [num_experts, hidden_size] and num_experts MLPs of width moe_ffn_hidden_size
    in place of its MLP.

    Attributes:
        architecture: the HF class name, the key into the converters' table, e.g. `LlamaForCausalLM`.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the gated MLP; where there are experts it is only what config.json says.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: width of one head; `num_heads * head_dim` may differ from `hidden_size`.
        vocab_size: rows of the embedding, never padded.
        max_position_embeddings: the longest sequence that the model claims, in tokens.
        rms_norm_eps: epsilon inside the square root of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or llama3 scaling.
        tie_word_embeddings: the output layer is the embedding.
        torch_dtype: what the weights are stored in: `bfloat16`, `float16` or `float32`.
        qk_norm: RMSNorm over head_dim of every query and key head, before the rotation; weights [head_dim].
        num_experts: experts of every layer; None for a dense model, and then the three below mean nothing.
        experts_per_token: experts that a token is sent to: those of the largest router probability.
        moe_ffn_hidden_size: width of one expert's gated MLP.
        norm_topk_prob: the chosen experts' probabilities are divided by their sum.
        qkv_bias: the query, key and value projections have a bias.
        activation: of the gate of the MLP: `silu`, or `gelu_tanh`, GELU's tanh form.
        attention_scale: what scores are multiplied by; None: head_dim ** -0.5.
        attention_softcap: scores s become c * tanh(s / c), before the mask; None: they do not.
        final_softcap: the same of logits.
        window: a query at position p sees the keys at positions > p - window, in the layers of `window_layers`.
        window_layers: layers (from 0) whose attention has that window.
        embedding_scale: what embeddings are multiplied by, rounded to their dtype; None: nothing.
        sandwich_norms: what attention and MLP answer is normalised too, before it is added to the residual stream.
        zero_centred_norms: RMSNorm multiplies by 1 + weight.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    torch_dtype: str
    qk_norm: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    moe_ffn_hidden_size: int | None = None
    norm_topk_prob: bool = False
    qkv_bias: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    embedding_scale: float | None = None
    sandwich_norms: bool = False
    zero_centred_norms: bool = False

    def differing(self, other: "ModelArch") -> dict[str, tuple[Any, Any]]:
        """The fields in which `other` gives other numbers for the same weights, or has others: {name: (own, other's)}.

        What the weights are stored in, and how long a sequence the model claims to take, are not among them.
        """
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if name not in NOT_IN_NUMBERS and pair[0] != pair[1]}

    def window_of(self, layer: int) -> int | None:
        """The window of a layer (from 0); None where it sees everything before it."""
        return self.window if layer in self.window_layers else None


def told_differences(differ: Mapping[str, tuple[Any, Any]]) -> str:
    """What `ModelArch.differing` has found, on one line."""
    return ", ".join(f"{name}: {own!r} and {other!r}" for name, (own, other) in differ.items())


def read_arch(path: str | Path) -> ModelArch:
    """The architecture of a Hugging Face folder or of a checkpoint folder (which keeps `hf/config.json`).

    Raises UnsupportedModelError for a key or value that no rule covers, ConfigError where there is no config.json.
    """
    from megafuse.converters.hf_config import read_hf_config  # here: hf_config itself imports ModelArch from this file

    folder = Path(path)
    return read_hf_config(folder / "hf" if (folder / "hf" / "config.json").is_file() else folder)
