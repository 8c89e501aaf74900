"""Mixture of experts: how megatron-core is told to compute what the published models compute.

A token's router probabilities are softmax(W x) over all experts, in fp32; it goes to the k most probable experts, and
what they answer is added up, weighted by those probabilities (divided by their sum where `norm_topk_prob`). No token is
dropped, no capacity, no auxiliary loss: fusion changes the target's answers, not its load balance.
"""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import linear

from megafuse.model.arch import ModelArch


def moe_settings(arch: ModelArch, *, layers: str = "torch") -> dict[str, Any]:
    """The part of mcore's TransformerConfig arguments that is about experts; {} for a dense model.

    layers: `torch` runs one expert after the other, `te` all of a rank's experts in one grouped product.

    `moe_router_pre_softmax` False is softmax over the chosen experts only. That is `norm_topk_prob`: divide softmax
    over all experts by its sum over the chosen, and the common denominator cancels.
    """
    if arch.num_experts is None:
        return {}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not arch.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # rows of different ranks may differ in length: all-to-all sends what there is, all-gather wants equal parts
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": layers == "te",
    }


class Fp32Router(TopKRouter):
    """mcore's router, whose own fp32 product needs Transformer Engine (it raises NameError without)."""

    def gating(self, input: Tensor) -> Tensor:
        """Router logits. [t, 1, hidden] any float dtype -> [t, 1, num_experts] fp32."""
        if self.weight.device != input.device:  # mcore leaves it on the host until it is first used
            self.weight.data = self.weight.data.to(input.device)
        return linear(input.float(), self.weight.float())


def torch_experts() -> ModuleSpec:
    """Experts of mcore's own parallel linear modules, for any device."""
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Fp32Router))
