"""Llama 2, 3.x and what is built like them (SmolLM2): no bias, tied or untied, llama3 rope scaling."""

from megafuse.converters.family import Family
from megafuse.converters.table import (
    ATTENTION,
    ATTENTION_STATES,
    EMBEDDING,
    END_STATES,
    HEAD,
    MLP_STATES,
    NORMED_MLP,
    Arch,
)

TABLE = Arch(
    "LlamaForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *NORMED_MLP, *HEAD),
    extra_states=(*ATTENTION_STATES, *MLP_STATES, *END_STATES),
)
RULES = Family("llama")
