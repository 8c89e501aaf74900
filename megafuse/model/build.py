"""From a ModelArch and a layout to this rank's part of the model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from megafuse.config.train import ModelConfig, OverlapConfig, ParallelConfig
from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch
from megafuse.parallel.policy import Policy, resolve_policy
from megafuse.parallel.topology import Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh form: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). Any shape."""
    return gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
FLEX_HEAD_DIM = 16  # torch's compiled flex_attention refuses narrower heads (seen in 2.11 and 2.13)
DDP_SWITCHES = ("overlap_grad_reduce", "overlap_param_gather")  # the rest of a Policy is the model's


@dataclass(frozen=True)
class Backend:
    """What computes the layers and how communication overlaps it; chosen once, here, and printed once."""

    layers: str  # torch | te
    attention: str  # sdpa | flex | te
    precision: str  # bf16 | fp32; auto until the ranks have met, see parallel.precision
    policy: Policy
    why: str = ""  # the reason for the precision, where it was `auto`

    def __str__(self) -> str:
        precision = f"{self.precision} ({self.why})" if self.why else self.precision
        return f"layers {self.layers}, attention {self.attention}, {precision}, {self.policy}"

    def at(self, precision: str, why: str) -> "Backend":
        """The same backend with the precision that the ranks have settled on."""
        return replace(self, precision=precision, why=why)


def choose_backend(
    config: ModelConfig,
    parallel: ParallelConfig | None = None,
    *,
    head_dim: int,
    prefix_sharing: bool,
    overlap: OverlapConfig | None = None,
    distributed_optimizer: bool = False,
) -> Backend:
    """Resolve `auto` by what is installed and usable. head_dim: width of one of the model's heads.

    Raises:
        ConfigError: a backend that is not usable, that cannot do what the data or the layout ask for, or an overlap
            that the layout cannot have; naming what it needs.
    """
    parallel = parallel or ParallelConfig()
    cuda, usable = torch.cuda.is_available(), te_usable()
    if "te" in (config.layers, config.attention) and not usable:
        raise ConfigError(
            "model.layers/model.attention = 'te' needs CUDA and an importable Transformer Engine; "
            "run `megafuse doctor`, or use 'auto'"
        )
    if config.attention == "te" and prefix_sharing:
        raise ConfigError("model.attention = 'te' cannot share prefixes; set data.prefix_sharing = false or use 'auto'")
    if config.attention == "te" and parallel.context > 1:
        raise ConfigError(
            f"model.attention = 'te' cannot attend over rows dealt to parallel.context = {parallel.context} ranks; "
            f"use 'auto', or parallel.context = 1"
        )
    attention = choose_attention(config.attention, head_dim, cuda=cuda)
    layers = "te" if config.layers == "te" or (config.layers == "auto" and usable) else "torch"
    policy = resolve_policy(
        overlap or OverlapConfig(),
        parallel,
        backend="nccl" if cuda else "gloo",
        distributed_optimizer=distributed_optimizer,
        te_layers=layers == "te",
    )
    return Backend(layers, attention, config.precision, policy)


def choose_attention(asked: str, head_dim: int, *, cuda: bool) -> str:
    """Core attention for heads of width `head_dim`: `asked`; `auto` is flex on CUDA where it can be, else sdpa.

    Raises:
        ConfigError: `flex` without CUDA, or for heads that it does not take.
    """
    wide = head_dim >= FLEX_HEAD_DIM
    if asked == "auto":
        return "flex" if cuda and wide else "sdpa"
    if asked == "flex" and not cuda:
        raise ConfigError("model.attention = 'flex' trains on CUDA only; use 'sdpa' or 'auto'")
    if asked == "flex" and not wide:
        raise ConfigError(
            f"model.attention = 'flex' needs heads of at least {FLEX_HEAD_DIM} dimensions, this model's have "
            f"{head_dim} (head_dim in its config.json); use 'sdpa' or 'auto'"
        )
    return asked


def te_usable() -> bool:
    """Transformer Engine imports and there is a CUDA device for it."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:
        return False
    return True


def transformer_config(arch: ModelArch, parallel: ParallelConfig, backend: Backend, recompute: str) -> Any:
    """mcore's TransformerConfig of `arch` at this layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megafuse.model.moe import moe_settings

    cuda = torch.cuda.is_available()
    dtype = DTYPES[backend.precision]
    policy = {k: v for k, v in asdict(backend.policy).items() if k not in DDP_SWITCHES}
    recomputation: dict[str, Any] = {}
    if recompute == "full":
        recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        recomputation = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[arch.activation],
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        softmax_scale=arch.attention_scale,
        layernorm_zero_centered_gamma=arch.zero_centred_norms,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=_last_stage_layers(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        # weights always come from a checkpoint; without initialisation mcore would not mark the sharded dimensions
        perform_initialization=True,
        init_method=torch.nn.init.zeros_,  # cheap, and padded vocabulary rows must hold finite numbers
        output_layer_init_method=torch.nn.init.zeros_,
        use_cpu_initialization=not cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=backend.precision == "bf16",
        calculate_per_token_loss=True,  # the step divides by its own exact denominator
        attention_softmax_in_fp32=True,
        bias_activation_fusion=cuda and arch.activation == "silu",  # mcore fuses no other that we have
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,  # RowSelfAttention turns queries and keys, and leaves mcore nothing to do
        persist_layer_norm=False,
        qk_layernorm=arch.qk_norm,
        **moe_settings(arch, layers=backend.layers),
        **policy,
        **recomputation,
    )


def _last_stage_layers(parallel: ParallelConfig) -> int | None:
    """With two stages the first one's layers say it all, and mcore divides by its number of middle stages: none."""
    redundant = parallel.pipeline == 2 and parallel.first_stage_layers is not None
    return None if redundant else parallel.last_stage_layers


def build_model(
    arch: ModelArch, parallel: ParallelConfig, topology: Topology, backend: Backend, *, recompute: str = "none"
) -> list[Any]:
    """This rank's part of the model, weights not yet loaded: one FusionGPT, or one a chunk of a virtual pipeline.

    Must run inside `parallel.topology.layout`, on a layout that `parallel.layouts.check_layout` has let pass.
    """
    from megafuse.model.gpt import FusionGPT
    from megafuse.model.rope import RowRotary
    from megafuse.model.spec import block_spec

    config = transformer_config(arch, parallel, backend, recompute)
    rotary = RowRotary(arch, topology.device)
    tp, chunks = parallel.tensor, parallel.virtual_pipeline
    parts = []
    for chunk in range(chunks):
        stage = chunk if chunks > 1 else None
        model = FusionGPT(
            config,
            block_spec(config, arch, layers=backend.layers, attention=backend.attention, vp_stage=stage),
            vocab_size=-(-arch.vocab_size // tp) * tp,  # padded rows exist only in memory: masked in the softmax
            max_sequence_length=arch.max_position_embeddings,
            pre_process=topology.is_first_stage and chunk == 0,
            post_process=topology.is_last_stage and chunk == chunks - 1,
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            pg_collection=topology.groups,
            rotary=rotary,
            attention=backend.attention,
            true_vocab_size=arch.vocab_size,
            final_softcap=arch.final_softcap,
            embedding_scale=arch.embedding_scale,
            vp_stage=stage,
        )
        parts.append(model.to(topology.device))
    return parts
