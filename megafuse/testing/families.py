"""A tiny random model of every family that converts, as a Hugging Face folder in fp32 (the first ones: `tiny`).

All are conditioned as `write_tiny_llama`. Every number of a configuration matters: caps are near the size of what they
cap, windows are shorter than the rows, scales differ from their defaults.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from megafuse.testing.tiny import (
    head_width,
    tiny_settings,
    write_tiny_llama,
    write_tiny_model,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

WINDOW = 8


def write_tiny_qwen2(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int | None = None,
    heads: int = 6,
    kv_heads: int = 2,
    vocab: int = 120,
    tied: bool = True,
) -> Path:
    """Qwen 2.5: with a bias on queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**tiny_settings(layers, hidden, heads, kv_heads, vocab, tied))
    return write_tiny_model(Qwen2ForCausalLM(config), folder, seed)


def write_tiny_mistral(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int | None = None,
    heads: int = 6,
    kv_heads: int = 2,
    vocab: int = 120,
    tied: bool = False,
    window: int | None = WINDOW,
) -> Path:
    """Mistral, with a window in every layer or none."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**tiny_settings(layers, hidden, heads, kv_heads, vocab, tied), sliding_window=window)
    return write_tiny_model(MistralForCausalLM(config), folder, seed)


def write_tiny_mixtral(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int | None = None,
    heads: int = 6,
    kv_heads: int = 2,
    vocab: int = 120,
    tied: bool = False,
    window: int | None = WINDOW,
    experts: int = 4,
    experts_per_token: int = 2,
) -> Path:
    """Mixtral: experts of width 2 * hidden under their names on disk, chosen as in `decide_routing`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **tiny_settings(layers, hidden, heads, kv_heads, vocab, tied),
        sliding_window=window,
        num_local_experts=experts,
        num_experts_per_tok=experts_per_token,
    )
    return write_tiny_model(MixtralForCausalLM(config), folder, seed, sparse=True)


def write_tiny_gemma2(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 120,
    tied: bool = True,
    window: int = WINDOW,
    attention_softcap: float | None = 1.0,
    final_softcap: float | None = 1.5,
) -> Path:
    """Gemma 2: layers 0 and 2 have the window, scores and logits are near their caps, heads are wider than usual."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **tiny_settings(layers, hidden, heads, kv_heads, vocab, tied),
        head_dim=head_dim or head_width(12),
        sliding_window=window,
        attn_logit_softcapping=attention_softcap,
        final_logit_softcapping=final_softcap,
        query_pre_attn_scalar=5,
    )
    return write_tiny_model(Gemma2ForCausalLM(config), folder, seed, centre=0.0)


def publish(folder: Path, *, dtype: str = "bfloat16", shards: int = 1) -> Path:
    """Give a written folder another dtype and number of files, their tensors in an order that is not the model's."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored.items()}
    names = sorted(weights, key=lambda name: name[::-1])
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


WRITERS: Mapping[str, Callable[..., Path]] = {
    "llama": write_tiny_llama,
    "qwen2": write_tiny_qwen2,
    "qwen3": write_tiny_qwen3,
    "qwen3_moe": write_tiny_qwen3_moe,
    "mistral": write_tiny_mistral,
    "mixtral": write_tiny_mixtral,
    "gemma2": write_tiny_gemma2,
}
