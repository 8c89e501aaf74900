"""Mistral: Llama whose layers may all have one window (0.1 has 4096, later ones none)."""

from megafuse.converters.family import Family, window_everywhere
from megafuse.converters.maps import llama
from megafuse.converters.table import Arch

TABLE = Arch("MistralForCausalLM", rows=llama.TABLE.rows, extra_states=llama.TABLE.extra_states)
RULES = Family(
    "mistral",
    translated=frozenset({"sliding_window"}),
    explicit=("num_key_value_heads",),
    present=("sliding_window",),  # absent, it is 4096 to transformers
    fields=window_everywhere,
)
