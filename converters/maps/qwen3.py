"""Qwen 3, dense: queries and keys are normalised, heads may be wider than hidden_size / heads."""

from collections.abc import Mapping
from typing import Any

from megafuse.converters.family import Family, refuse_windows
from megafuse.converters.table import (
    ATTENTION,
    ATTENTION_STATES,
    EMBEDDING,
    END_STATES,
    HEAD,
    MLP_STATES,
    NORMED_MLP,
    QK_NORM,
    QK_STATES,
    Arch,
)

TABLE = Arch(
    "Qwen3ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *QK_NORM, *NORMED_MLP, *HEAD),
    extra_states=(*ATTENTION_STATES, *QK_STATES, *MLP_STATES, *END_STATES),
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen 3's own fields of ModelArch."""
    refuse_windows(config)
    return {"qk_norm": True}


RULES = Family(
    "qwen3",
    translated=frozenset({"layer_types"}),
    # a window is only looked at where use_sliding_window is true, which the shared rule refuses
    harmless=frozenset({"sliding_window", "max_window_layers"}),
    explicit=("head_dim", "num_key_value_heads"),
    fields=fields,
)
