"""Tiny models and data sets with random content: what parity tests and `gpu-check` train on."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.data.store import FORMAT, GROUPS, MANIFEST, Row, RowWriter, content_digest, file_sizes, save_sorted


def write_tiny_llama(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    vocab: int = 120,
    tied: bool = True,
) -> Path:
    """A random Llama with llama3 rope scaling as a Hugging Face folder, fp32.

    Norm weights vary by 10%, matrices are well conditioned: fp32 rounding stays near 1e-6 through Adam's division.

    The scaling's `original_max_position_embeddings` is 64, so that short rows already cross its knee.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        attention_bias=False,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.1 * noise if param.ndim == 1 else noise * 0.6 / param.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def write_tiny_dataset(
    folder: Path, kind: str, *, seed: int, groups: int = 24, sources: int = 3, vocab: int = 120
) -> Path:
    """Random groups of `kind` as a data set: uneven prompts (2 to 9 tokens) and responses (1 to 12 tokens)."""
    rng = np.random.default_rng(seed)
    rows = [_random_group(f"p{i:04d}", kind, rng, sources, vocab) for i in range(groups)]
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


def _random_group(name: str, kind: str, rng: np.random.Generator, sources: int, vocab: int) -> Row:
    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocab, rng.integers(low, high), dtype=np.int32)

    members: list[tuple[int, ...]]
    if kind == "sft":
        members = [(i,) for i in range(int(rng.integers(1, 5)))]
    elif kind == "pair":
        members = [(2 * i, 2 * i + 1) for i in range(int(rng.integers(1, sources + 1)))]
    elif kind == "wrpo":
        members = [(0, 1, 2)]
    else:
        sizes = rng.integers(2, 4, int(rng.integers(1, sources + 1)))
        ends = np.cumsum(sizes)
        members = [tuple(range(end - size, end)) for size, end in zip(sizes.tolist(), ends.tolist())]
    count = max(max(m) for m in members) + 1
    weights = rng.random(len(members)) + 0.1
    return Row(
        prompt_id=name,
        domain="instruction",
        prompt=tokens(2, 10),
        responses=tuple(tokens(1, 13) for _ in range(count)),
        sources=tuple(f"s{i}" for i in range(count)),
        rewards=rng.random(count),
        members=() if kind == "rank" else tuple(members),
        weights=np.zeros(0) if kind == "rank" else weights / weights.sum(),
    )
