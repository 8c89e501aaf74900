"""Gemma 2: norms before and after attention and MLP, soft caps, a window in every other layer, GELU, scaled embeddings.

Its norms store what is added to 1: the weights are copied as they are, and the model's norms add the 1.
"""

from collections.abc import Mapping
from typing import Any

from megafuse.converters.config_values import positive_float, positive_int, refuse
from megafuse.converters.family import FULL, KERNEL_KEYS, KERNELS, WINDOWED, Family, layer_types
from megafuse.converters.table import (
    ATTENTION,
    ATTENTION_STATES,
    EMBEDDING,
    END_STATES,
    HEAD,
    MLP,
    MLP_STATES,
    Arch,
    Hf,
    Row,
)

_H, _M = "model.layers.{i}.", "decoder.layers.{i}."
_SANDWICH = (
    Row(_M + "self_attention.linear_proj.post_layernorm.weight", (Hf(_H + "post_attention_layernorm.weight", "H"),)),
    Row(_M + "mlp.linear_fc1.layer_norm_weight", (Hf(_H + "pre_feedforward_layernorm.weight", "H"),)),
    Row(_M + "mlp.linear_fc2.post_layernorm.weight", (Hf(_H + "post_feedforward_layernorm.weight", "H"),)),
)
_SANDWICH_STATES = (_M + "self_attention.linear_proj.post_layernorm.", _M + "mlp.linear_fc2.post_layernorm.")
TABLE = Arch(
    "Gemma2ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *_SANDWICH, *MLP, *HEAD),
    extra_states=(*ATTENTION_STATES, *_SANDWICH_STATES, *MLP_STATES, *END_STATES),
)
_CAPS = {"attention_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma's own fields of ModelArch. Layers 0, 2, 4 ... have the window unless `layer_types` says otherwise."""
    kinds = layer_types(config, otherwise=lambda layer: FULL if layer % 2 else WINDOWED)
    window = positive_int(config, "sliding_window")
    if config.get("sliding_window_size", window) != window:
        refuse("sliding_window_size", config["sliding_window_size"], (f"sliding_window = {window}",))
    return {
        "activation": "gelu_tanh",
        "attention_scale": positive_float(config, "query_pre_attn_scalar") ** -0.5,
        **{field: None if config[key] is None else positive_float(config, key) for field, key in _CAPS.items()},
        "window": window,
        "window_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == WINDOWED),
        "embedding_scale": positive_int(config, "hidden_size") ** 0.5,
        "sandwich_norms": True,
        "zero_centred_norms": True,
    }


_GELU = ("gelu_pytorch_tanh",)
RULES = Family(
    "gemma2",
    translated=frozenset(
        {*_CAPS.values(), "layer_types", "query_pre_attn_scalar", "sliding_window", "sliding_window_size"}
    ),
    fixed={
        **dict.fromkeys(("activation", "hidden_act", "hidden_activation"), _GELU),
        # sdpa has no cap on scores: transformers 4 left it out in silence
        **dict.fromkeys(KERNEL_KEYS, tuple(kernel for kernel in KERNELS if kernel != "sdpa")),
        "use_bidirectional_attention": (False, None),
    },
    harmless=frozenset({"cache_implementation"}),
    explicit=("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "sliding_window"),
    present=tuple(_CAPS.values()),
    fields=fields,
    tied=True,
)
