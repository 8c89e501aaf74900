"""From a ModelArch and a layout to this rank's part of the model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch
from megafuse.parallel.topology import Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Backend:
    """What computes the layers; chosen once, here, and printed once."""

    layers: str  # torch | te
    attention: str  # sdpa | te
    precision: str  # bf16 | fp32

    def __str__(self) -> str:
        return f"layers {self.layers}, attention {self.attention}, {self.precision}"


def choose_backend(config: ModelConfig, *, prefix_sharing: bool) -> Backend:
    """Resolve `auto` by what is installed and usable.

    Raises:
        ConfigError: when Transformer Engine is asked for and not usable, or asked to attend over shared prefixes.
    """
    usable = te_usable()
    if "te" in (config.layers, config.attention) and not usable:
        raise ConfigError(
            "model.layers/model.attention = 'te' needs CUDA and an importable Transformer Engine; "
            "run `megafuse doctor`, or use 'auto'"
        )
    if config.attention == "te" and prefix_sharing:
        raise ConfigError("model.attention = 'te' cannot share prefixes; set data.prefix_sharing = false or use 'sdpa'")
    layers = "te" if config.layers == "te" or (config.layers == "auto" and usable) else "torch"
    return Backend(layers, "te" if config.attention == "te" else "sdpa", config.precision)


def te_usable() -> bool:
    """Transformer Engine imports and there is a CUDA device for it."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:
        return False
    return True


def check_divides(arch: ModelArch, parallel: ParallelConfig) -> None:
    """Refuse a layout that the architecture cannot be cut into.

    Raises:
        ConfigError: naming the number, and by what it does not divide.
    """
    for name, size, ways, key in (
        ("attention heads", arch.num_heads, parallel.tensor, "tensor"),
        ("KV heads", arch.num_kv_heads, parallel.tensor, "tensor"),
        ("MLP width", arch.ffn_hidden_size, parallel.tensor, "tensor"),
        ("layers", arch.num_layers, parallel.pipeline, "pipeline"),
    ):
        if size % ways:
            divisors = [d for d in range(1, size + 1) if size % d == 0 and d <= 64]
            raise ConfigError(
                f"{name} = {size} is not divisible by parallel.{key} = {ways}; "
                f"parallel.{key} may be one of {', '.join(map(str, divisors))}"
            )


def transformer_config(arch: ModelArch, parallel: ParallelConfig, backend: Backend, recompute: str) -> Any:
    """mcore's TransformerConfig of `arch` at this layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    cuda = torch.cuda.is_available()
    dtype = DTYPES[backend.precision]
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
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
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
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=cuda,  # gloo still reads the buffer after the send has returned
        **recomputation,
    )


def build_model(
    arch: ModelArch, parallel: ParallelConfig, topology: Topology, backend: Backend, *, recompute: str = "none"
) -> Any:
    """This rank's pipeline stage, weights not yet loaded.

    Must run inside `parallel.topology.layout`. Raises ConfigError when the architecture does not divide.
    """
    from megafuse.model.gpt import FusionGPT
    from megafuse.model.rope import RowRotary
    from megafuse.model.spec import block_spec

    check_divides(arch, parallel)
    config = transformer_config(arch, parallel, backend, recompute)
    tp = parallel.tensor
    model = FusionGPT(
        config,
        block_spec(config, layers=backend.layers, attention=backend.attention),
        vocab_size=-(-arch.vocab_size // tp) * tp,  # padded rows exist only in memory: masked in the softmax
        max_sequence_length=arch.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="rope",
        pg_collection=topology.groups,
        rotary=RowRotary(arch, topology.device),
        attention=backend.attention,
        true_vocab_size=arch.vocab_size,
    )
    return model.to(topology.device)
