"""Target models by name: the sizes of published configurations, so that throughput needs no download."""

import difflib
from pathlib import Path

from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch, read_arch


def _shape(
    layers: int, hidden: int, ffn: int, heads: tuple[int, int], vocab: int,
    *, head_dim: int = 128, tied: bool = False, qk_norm: bool = False, experts: tuple[int, int, int] | None = None,
) -> ModelArch:  # fmt: skip
    """heads: (query, key/value); experts: (number, chosen a token, width). What costs no time is the same for all."""
    count, chosen, width = experts or (None, None, None)
    return ModelArch(
        architecture="Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        tie_word_embeddings=tied,
        torch_dtype="bfloat16",
        qk_norm=qk_norm,
        num_experts=count,
        experts_per_token=chosen,
        moe_ffn_hidden_size=width,
        norm_topk_prob=experts is not None,
    )


SHAPES: dict[str, ModelArch] = {
    "tiny": _shape(4, 48, 96, (6, 2), 120, head_dim=16, tied=True),
    "tiny-moe": _shape(4, 48, 96, (6, 2), 120, head_dim=16, qk_norm=True, experts=(8, 2, 32)),
    "smollm2-135m": _shape(30, 576, 1536, (9, 3), 49152, head_dim=64, tied=True),
    "llama-3.2-1b": _shape(16, 2048, 8192, (32, 8), 128256, head_dim=64, tied=True),
    "llama-3.2-3b": _shape(28, 3072, 8192, (24, 8), 128256, tied=True),
    "llama-3.1-8b": _shape(32, 4096, 14336, (32, 8), 128256),
    "llama-3.1-70b": _shape(80, 8192, 28672, (64, 8), 128256),
    "llama-3.1-405b": _shape(126, 16384, 53248, (128, 8), 128256),
    "qwen2.5-7b": _shape(28, 3584, 18944, (28, 4), 152064),  # without its biases on q, k and v: 0.002% of it
    "qwen3-8b": _shape(36, 4096, 12288, (32, 8), 151936, qk_norm=True),
    "qwen3-30b-a3b": _shape(48, 2048, 6144, (32, 4), 151936, qk_norm=True, experts=(128, 8, 768)),
}
"""Name -> sizes. `tiny` and `tiny-moe` are for trying a layout in seconds, with heads as narrow as flex takes."""


def resolve_shape(path: Path) -> ModelArch:
    """The sizes that `model.path` means: those of a folder where there is one, else of a named shape.

    Raises:
        ConfigError: neither; with the nearest name and all of them.
        UnsupportedModelError: the folder's config.json has something that no rule covers.
    """
    if path.is_dir():
        return read_arch(path)
    name = str(path)
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    near = difflib.get_close_matches(name.lower(), SHAPES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"model.path = {name!r} is neither a folder nor a named shape; {hint}Shapes: {', '.join(SHAPES)}")


def parameter_count(arch: ModelArch) -> int:
    """Parameters of the whole model: embedding, layers with their norms, last norm, LM head unless tied."""
    h, d = arch.hidden_size, arch.head_dim
    attention = h * (arch.num_heads + 2 * arch.num_kv_heads) * d + arch.num_heads * d * h
    if arch.num_experts and arch.moe_ffn_hidden_size:
        mlp = arch.num_experts * (3 * h * arch.moe_ffn_hidden_size + h)
    else:
        mlp = 3 * h * arch.ffn_hidden_size
    norms = 2 * h + (2 * d if arch.qk_norm else 0)
    embeddings = arch.vocab_size * h * (1 if arch.tie_word_embeddings else 2)
    return arch.num_layers * (attention + mlp + norms) + h + embeddings
