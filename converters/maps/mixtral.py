"""Mixtral: Mistral with experts in every layer, w1 the gate, w3 up and w2 down."""

from collections.abc import Mapping
from typing import Any

from megafuse.converters.family import Family, experts, window_everywhere
from megafuse.converters.table import (
    ATTENTION,
    ATTENTION_STATES,
    EMBEDDING,
    END_STATES,
    EXPERT_STATES,
    HEAD,
    Arch,
    sparse_mlp,
)

TABLE = Arch(
    "MixtralForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *sparse_mlp("block_sparse_moe", "w1", "w3", "w2"), *HEAD),
    extra_states=(*ATTENTION_STATES, *EXPERT_STATES, *END_STATES),
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its own fields of ModelArch. The probabilities of the chosen experts always add up to 1."""
    return {**window_everywhere(config), **experts(config, width="intermediate_size", normalised=True)}


RULES = Family(
    "mixtral",
    translated=frozenset({"num_experts_per_tok", "num_local_experts", "sliding_window"}),
    fixed={"router_jitter_noise": (0, None)},
    # about a training loss that fusion does not have: the targets' answers are trained, not their load balance
    harmless=frozenset({"output_router_logits", "router_aux_loss_coef"}),
    explicit=("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps"),
    fields=fields,
    rope_theta=1e6,
)
