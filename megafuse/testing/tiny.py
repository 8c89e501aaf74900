"""Tiny models and data sets with random content: what parity tests and `gpu-check` train on."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.config.train import TrainConfig
from megafuse.data.store import FORMAT, GROUPS, MANIFEST, Row, RowWriter, content_digest, file_sizes, save_sorted
from megafuse.testing.distributed import has_cuda


def write_tiny_llama(
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
    """A random Llama with llama3 rope scaling as a Hugging Face folder, fp32.

    Norm weights vary by 10%, matrices are well conditioned: fp32 rounding stays near 1e-6 through Adam's division.

    The scaling's `original_max_position_embeddings` is 64, so that short rows already cross its knee.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    settings = tiny_settings(layers, hidden, heads, kv_heads, vocab, tied)
    config = LlamaConfig(**settings | {"rms_norm_eps": 1e-5, "rope_parameters": rope})
    return write_tiny_model(LlamaForCausalLM(config), folder, seed)


def head_width(narrow: int) -> int:
    """Width of a tiny model's heads: `narrow`, and where there is CUDA at least what its attention (flex) takes."""
    from megafuse.model.build import FLEX_HEAD_DIM

    return max(narrow, FLEX_HEAD_DIM) if has_cuda() else narrow


def tiny_settings(layers: int, hidden: int | None, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    """What the configurations of the families share; MLPs are twice as wide as the model.

    hidden: None is 48, and where there is CUDA as much as heads that flex takes need.
    """
    hidden = hidden or heads * head_width(48 // heads)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
    }


def write_tiny_model(model: Any, folder: Path, seed: int, *, centre: float = 1.0, sparse: bool = False) -> Path:
    """Save transformers' `model` in `folder` with random fp32 weights: `randomise`, if `sparse` `decide_routing`."""
    import torch

    model, generator = model.float(), torch.Generator().manual_seed(seed)
    randomise(model, generator, centre=centre)
    if sparse:
        decide_routing(model, generator, tied=model.config.tie_word_embeddings)
    model.save_pretrained(folder)
    return folder


def randomise(model: Any, generator: Any, *, centre: float = 1.0) -> None:
    """Norm weights `centre` + 0.1 N, biases 0.3 N, matrices (and stacks of them) 0.6 N / sqrt(columns)."""
    import torch

    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith(".bias"):
                param.copy_(0.3 * noise)
            else:
                param.copy_(centre + 0.1 * noise if param.ndim == 1 else noise * 0.6 / param.shape[-1] ** 0.5)


def decide_routing(model: Any, generator: Any, *, tied: bool) -> None:
    """Make a random model's choice of experts independent of rounding, in transformers' Qwen3-MoE or Mixtral.

    Between random logits some token of a few thousand always stands within 1e-6 of another choice, whatever their
    scale. So the first dimensions of the embedding, as many as experts, are a mark: +1 at as many random places as a
    token has experts, -1 elsewhere, which the layers hardly write to; and every router reads them, in an order of its
    own. Chosen and other logits are then far apart (> 1), while the probabilities among the chosen still depend on
    everything.
    """
    import torch

    experts, vocab = model.config.num_local_experts, model.config.vocab_size
    with torch.no_grad():
        chosen = torch.rand(vocab, experts, generator=generator).argsort(-1)[:, : model.config.num_experts_per_tok]
        marks = torch.full((vocab, experts), -1.0).scatter(1, chosen, 1.0)
        model.model.embed_tokens.weight[:, :experts] = marks
        if tied:  # the marks would make nearly all of every logit
            model.model.norm.weight[:experts] *= 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:experts] *= 0.1
            layer.mlp.experts.down_proj[:, :experts] *= 0.1
            order = torch.randperm(experts, generator=generator)
            router = layer.mlp.gate.weight
            router.mul_(0.3)
            router[torch.arange(experts), order] += 2.0


def write_tiny_qwen3(
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
) -> Path:
    """A random dense Qwen3 (QK norm, heads wider than hidden / heads) as a Hugging Face folder, fp32.

    Conditioned as `write_tiny_llama`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **tiny_settings(layers, hidden, heads, kv_heads, vocab, tied), head_dim=head_dim or head_width(12)
    )
    return write_tiny_model(Qwen3ForCausalLM(config), folder, seed)


def write_tiny_qwen3_moe(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 120,
    tied: bool = False,
    experts: int = 8,
    experts_per_token: int = 2,
    expert_width: int = 32,
    norm_topk_prob: bool = True,
) -> Path:
    """A random Qwen3-MoE as a Hugging Face folder, fp32, per-expert names on disk as published models have them.

    Conditioned as `write_tiny_llama`, and the choice of experts does not depend on rounding: `decide_routing`.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **tiny_settings(layers, hidden, heads, kv_heads, vocab, tied),
        head_dim=head_dim or head_width(12),
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=expert_width,
        norm_topk_prob=norm_topk_prob,
    )
    return write_tiny_model(Qwen3MoeForCausalLM(config), folder, seed, sparse=True)


def tiny_run(run_dir: Path, model: Path, dataset: Path, /, **settings: Any) -> TrainConfig:
    """A training run for tests: fp32, FuseSFT, a checkpoint at the end, no TensorBoard.

    `settings` replace what they name: tables field by field, but the loss as a whole.
    """
    values: dict[str, Any] = {
        "run_dir": run_dir,
        "model": {"path": model, "precision": "fp32"},
        "data": {"dataset": dataset, "max_row_tokens": 256},
        "loss": {"name": "sft"},
        "optim": {"lr": 1e-3},
        "checkpoint": {"interval": 0},
        "observe": {"tensorboard": False},
        "global_batch_size": 8,
    }
    for name, value in settings.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) and name != "loss" else value
    return TrainConfig.model_validate(values)


def write_tiny_dataset(
    folder: Path,
    kind: str,
    *,
    seed: int,
    groups: int = 24,
    sources: int = 3,
    responses: int | None = None,
    longest: int = 12,
    vocab: int = 120,
) -> Path:
    """Random groups of `kind` as a data set: uneven prompts (1 to 9 tokens) and responses (1 to `longest` tokens).

    Up to `sources` sources a group, with a few responses each; with `responses`, all of them with exactly so many.
    """
    rng = np.random.default_rng(seed)
    rows = [_random_group(f"p{i:04d}", kind, rng, sources, responses, longest, vocab) for i in range(groups)]
    folder.mkdir(parents=True)
    writer = RowWriter(folder / "rows.arrow")
    for row in rows:
        writer.append(row)
    writer.close()
    save_sorted(folder / "rows.arrow", list(range(groups)), folder / GROUPS)
    (folder / "rows.arrow").unlink()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "groups": groups,
        "responses": sum(len(row.responses) for row in rows),
        "tokens": sum(row.tokens for row in rows),
        "max_group_tokens": max(row.tokens for row in rows),
        "vocab_size": vocab,
        "digest": {"data": content_digest(kind, [r.digest() for r in rows]), "tokenizer": "tiny", "template": "tiny"},
        "files": file_sizes(folder, GROUPS),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def _random_group(
    name: str, kind: str, rng: np.random.Generator, sources: int, responses: int | None, longest: int, vocab: int
) -> Row:
    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocab, rng.integers(low, high), dtype=np.int32)

    members: list[tuple[int, ...]]
    if kind == "sft":
        members = [(i,) for i in range(sources * responses if responses else int(rng.integers(1, 5)))]
    elif kind == "pair" and responses:
        members = [(i * responses, (i + 1) * responses - 1) for i in range(sources)]
    elif kind == "pair":
        members = [(2 * i, 2 * i + 1) for i in range(int(rng.integers(1, sources + 1)))]
    elif kind == "wrpo":
        members = [(0, 1, 2)]
    else:
        sizes = rng.integers(2, 4, int(rng.integers(1, sources + 1)))
        if responses:
            sizes = np.full(sources, responses)
        ends = np.cumsum(sizes)
        members = [tuple(range(end - size, end)) for size, end in zip(sizes.tolist(), ends.tolist())]
    count = max(max(m) for m in members) + 1
    weights = rng.random(len(members)) + 0.1
    return Row(
        prompt_id=name,
        domain="instruction",
        prompt=tokens(1, 10),
        responses=tuple(tokens(1, longest + 1) for _ in range(count)),
        sources=tuple(f"s{i}" for i in range(count)),
        rewards=rng.random(count),
        members=() if kind == "rank" else tuple(members),
        weights=np.zeros(0) if kind == "rank" else weights / weights.sum(),
    )
