from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch
from megafuse.observe.flops import device_peak_flops, flops_per_token, group_pairs, layer_pairs, mfu, model_flops


def sizes_of(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool = False
) -> ModelArch:
    return ModelArch(
        architecture="LlamaForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tie_word_embeddings=tied,
        torch_dtype="bfloat16",
    )


LLAMA_8B = sizes_of(32, 4096, 14336, 32, 8, 128, 128256)


@pytest.mark.parametrize(
    "sizes",
    [
        sizes_of(2, 64, 160, 4, 2, 16, 257),
        sizes_of(3, 48, 100, 6, 1, 32, 99, tied=True),  # heads wider than the model
    ],
)
@pytest.mark.parametrize("kept", [0, 5])
def test_against_torch_counter(sizes: ModelArch, kept: int) -> None:
    """torch counts every matrix product that runs: dense attention (all S^2 pairs), logits of the last `kept` rows."""
    config = LlamaConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab_size,
        tie_word_embeddings=sizes.tie_word_embeddings,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    batch, length = 3, 23
    ids = torch.randint(sizes.vocab_size, (batch, length))
    head_rows = batch * (kept or length)
    numbers = {"tokens": batch * length, "head_rows": head_rows, "pairs": sizes.num_layers * batch * length**2}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, logits_to_keep=kept)
    assert counter.get_total_flops() == model_flops(sizes, **numbers, backward=False)
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=kept).logits.sum().backward()
    assert counter.get_total_flops() == model_flops(sizes, **numbers)


@pytest.mark.parametrize("experts", [(6, 2, 20), (5, 5, 7)])
def test_experts_against_torch_counter(experts: tuple[int, int, int]) -> None:
    """Every token goes to so many experts and no other; the router sees every token."""
    count, chosen, width = experts
    sizes = replace(
        sizes_of(2, 32, 999, 4, 2, 16, 77), num_experts=count, experts_per_token=chosen, moe_ffn_hidden_size=width
    )
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=999, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=77, num_experts=count, num_experts_per_tok=chosen, moe_intermediate_size=width,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    batch, length = 3, 11
    ids = torch.randint(77, (batch, length))
    numbers = {"tokens": batch * length, "head_rows": batch * length, "pairs": sizes.num_layers * batch * length**2}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == model_flops(sizes, **numbers, backward=False)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    assert counter.get_total_flops() == model_flops(sizes, **numbers)
    with pytest.raises(ConfigError, match="num_experts = 6 needs experts_per_token and moe_ffn_hidden_size, got 2 "):
        flops_per_token(replace(sizes, num_experts=6, experts_per_token=2, moe_ffn_hidden_size=None))


def test_linear_flops_are_two_a_parameter() -> None:
    """Llama-3.1-8B: 8,030,261,248 parameters, of which embeddings, LM head and norms are known."""
    linear = 8_030_261_248 - 2 * 128256 * 4096 - (2 * 32 + 1) * 4096
    assert flops_per_token(LLAMA_8B) == 2 * linear
    assert model_flops(LLAMA_8B, 7, 0, 0) == 6 * 7 * linear
    assert model_flops(LLAMA_8B, 0, 3, 0) == 6 * 3 * 128256 * 4096


def mask_pairs(prompt: int, responses: np.ndarray, sharing: bool, window: int | None) -> int:
    """The mask of every query and key of a group, made place by place and counted."""
    groups = [responses] if sharing else [responses[i : i + 1] for i in range(len(responses))]
    seen = 0
    for group in groups:
        segment = np.repeat(np.arange(1 + len(group)), [prompt, *group])
        position = np.concatenate([np.arange(prompt), *(prompt + np.arange(r) for r in group)])
        for q in range(len(segment)):
            for k in range(q + 1):
                admitted = segment[q] == segment[k] or segment[k] == 0
                seen += bool(admitted and (window is None or position[k] > position[q] - window))
    return seen


@pytest.mark.parametrize("sharing", [True, False])
def test_pairs_against_the_mask_itself(sharing: bool) -> None:
    rng = np.random.default_rng()
    for window in (None, 1, 2, 3, 5, 8, 13, 40, None):
        prompt, responses = int(rng.integers(1, 9)), rng.integers(0, 9, size=rng.integers(1, 5))
        wanted = mask_pairs(prompt, responses, sharing, window)
        assert group_pairs(prompt, responses.tolist(), sharing, window) == wanted, (prompt, responses, window)
        if window is None:
            assert group_pairs(prompt, responses.tolist(), sharing) == wanted


@pytest.mark.parametrize("sharing", [True, False])
def test_pairs_of_layers_with_and_without_a_window(sharing: bool) -> None:
    """Gemma 2 has a window in every other layer, Mistral in all; of a batch of groups, layer by layer."""
    rng = np.random.default_rng()
    counts = rng.integers(1, 5, size=6)
    prompts, flat = rng.integers(1, 12, size=6), rng.integers(0, 12, size=counts.sum())
    offsets = np.concatenate(([0], np.cumsum(counts)))
    five = replace(LLAMA_8B, num_layers=5)
    for layers in ((), (0, 2, 4), (0, 1, 2, 3, 4)):
        arch = replace(five, window=6 if layers else None, window_layers=layers)
        wanted = [
            sum(mask_pairs(p, flat[a:b], sharing, arch.window_of(layer)) for layer in range(5))
            for p, a, b in zip(prompts.tolist(), offsets, offsets[1:])
        ]
        found = layer_pairs(arch, prompts.astype(np.int32), flat.astype(np.int32), offsets, sharing)
        assert found.tolist() == wanted and found.dtype == np.int64


def test_a_windowed_model_costs_less() -> None:
    """A row of 8192 tokens under a window of 4096 in half of the layers, by hand."""
    gemma = replace(LLAMA_8B, num_layers=26, window=4096, window_layers=tuple(range(0, 26, 2)))
    lengths = np.array([0]), np.array([8192]), np.array([0, 1])
    pairs = int(layer_pairs(gemma, *lengths, False)[0])
    assert pairs == 13 * (8192 * 8193 // 2) + 13 * (4096 * 4097 // 2 + 4096 * 4096)
    full = int(layer_pairs(replace(gemma, window=None, window_layers=()), *lengths, False)[0])
    assert model_flops(gemma, 0, 0, full) - model_flops(gemma, 0, 0, pairs) == 12 * 32 * 128 * (full - pairs) > 0


def test_mfu() -> None:
    assert mfu(989e12 * 4, 2.0, 8, 989e12) == pytest.approx(0.25)
    assert mfu(1e12, 1.0, 1, None) is None
    for seconds, devices, peak in ((0.0, 1, 1e12), (1.0, 0, 1e12), (1.0, 1, -1.0)):
        with pytest.raises(ConfigError, match="peak_tflops"):
            mfu(1e12, seconds, devices, peak)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
        ("AMD EPYC 9B14", None),
    ],
)
def test_device_peaks(name: str, tflops: float | None) -> None:
    expected = None if tflops is None else tflops * 1e12
    assert all(
        device_peak_flops(name, t) == expected for t in ("torch.bfloat16", "bfloat16", "bf16", "fp16", "float16")
    )
    assert device_peak_flops(name, "float32") is None and device_peak_flops(name, "fp32") is None


def test_sharing_costs_less_and_never_more() -> None:
    small = replace(LLAMA_8B, num_layers=1)
    responses = [100, 30]
    shared = model_flops(small, 50 + 130, 130, group_pairs(50, responses, True))
    copied = model_flops(small, 2 * 50 + 130, 130, group_pairs(50, responses, False))
    assert shared < copied
    assert group_pairs(50, [100], True) == group_pairs(50, [100], False)
