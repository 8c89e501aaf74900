"""Qwen 3 with experts in every layer."""

from collections.abc import Mapping
from typing import Any

from megafuse.converters.config_values import flag
from megafuse.converters.family import Family, experts
from megafuse.converters.maps import qwen3
from megafuse.converters.table import (
    ATTENTION,
    ATTENTION_STATES,
    EMBEDDING,
    END_STATES,
    EXPERT_STATES,
    HEAD,
    QK_NORM,
    QK_STATES,
    Arch,
    sparse_mlp,
)

TABLE = Arch(
    "Qwen3MoeForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *QK_NORM, *sparse_mlp("mlp", "gate_proj", "up_proj", "down_proj"), *HEAD),
    extra_states=(*ATTENTION_STATES, *QK_STATES, *EXPERT_STATES, *END_STATES),
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its own fields of ModelArch."""
    sparse = experts(config, width="moe_intermediate_size", normalised=flag(config, "norm_topk_prob"))
    return {**qwen3.fields(config), **sparse}


RULES = Family(
    "qwen3_moe",
    translated=frozenset(
        {
            "layer_types",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
        }
    ),
    # every layer has experts: dense layers in between would need another table
    fixed={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    # about a training loss that fusion does not have: the targets' answers are trained, not their load balance
    harmless=qwen3.RULES.harmless | {"output_router_logits", "router_aux_loss_coef"},
    explicit=("head_dim", "num_key_value_heads", "norm_topk_prob"),
    fields=fields,
)
