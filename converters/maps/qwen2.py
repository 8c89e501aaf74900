"""Qwen 2 and 2.5: Llama with a bias on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from megafuse.converters.family import Family, refuse_windows
from megafuse.converters.maps import llama
from megafuse.converters.table import ATTENTION, EMBEDDING, HEAD, NORMED_MLP, QKV_BIAS, Arch

TABLE = Arch(
    "Qwen2ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, QKV_BIAS, *NORMED_MLP, *HEAD),
    extra_states=llama.TABLE.extra_states,
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's own fields of ModelArch."""
    refuse_windows(config)
    return {"qkv_bias": True}


RULES = Family(
    "qwen2",
    translated=frozenset({"layer_types"}),
    # a window is only looked at where use_sliding_window is true, which the shared rule refuses
    harmless=frozenset({"sliding_window", "max_window_layers"}),
    explicit=("num_key_value_heads",),
    fields=fields,
)
