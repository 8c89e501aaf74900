"""The layer specification: which module stands for each part of a transformer layer.

Without Transformer Engine: mcore's parallel linear layers, our RMSNorm and core attention. With it: mcore's TE spec,
whose core attention is replaced by ours unless the run asks for TE's. Both turn queries and keys by our own rotary
positions, and store the same checkpoint names.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megafuse.model.arch import ModelArch
from megafuse.model.attention import core_attention
from megafuse.model.moe import torch_experts
from megafuse.model.norm import RMSNorm, normed
from megafuse.model.rope import RowSelfAttention

# mcore stores every flavour under Transformer Engine's names, where a norm is part of the linear layer behind it; a
# router and its experts share the norm before them, which stays on its own
CANONICAL_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
CANONICAL_MOE_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def torch_layer(core_attention: Any, arch: ModelArch) -> ModuleSpec:
    """A layer of mcore's own parallel linear modules, for any device."""
    row = normed(RowParallelLinear, RMSNorm) if arch.sandwich_norms else RowParallelLinear
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row))
    norm, experts = RMSNorm if arch.qk_norm else None, arch.num_experts is not None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=RowSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=row,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=torch_experts() if experts else mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CANONICAL_MOE_NAMES if experts else CANONICAL_NAMES,
        ),
    )


def te_layer(core_attention: Any | None, arch: ModelArch) -> ModuleSpec:
    """A layer of Transformer Engine's modules; `core_attention` None keeps TE's own."""
    from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    experts = arch.num_experts
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=arch.qk_norm
    )
    spec.submodules.self_attention.module = RowSelfAttention
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    if arch.sandwich_norms:
        row = normed(TERowParallelLinear, TENorm)
        spec.submodules.self_attention.submodules.linear_proj = row
        spec.submodules.mlp.submodules.linear_fc2 = row
    return spec


def block_spec(
    config: Any, arch: ModelArch, *, layers: str, attention: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Specification of one pipeline stage's layers.

    layers: `torch` or `te`; attention: `sdpa`, `flex` or `te`; vp_stage: the virtual stage, None without them.
    """
    core = core_attention(attention, arch)
    if layers == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = te_layer(core, arch), TENorm
    else:
        layer, norm = torch_layer(core, arch), RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
