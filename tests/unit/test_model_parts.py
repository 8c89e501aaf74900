"""RoPE, norm and row attention against transformers and plain float64 arithmetic."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megafuse.data.shard import owners
from megafuse.errors import ConfigError
from megafuse.kernels.rope import rotate_heads
from megafuse.model import attention
from megafuse.model.arch import ModelArch, RopeScaling
from megafuse.model.attention import (
    RowAttention,
    RowCache,
    core_attention,
    row_positions,
    sdpa_attend,
    sdpa_blocks,
    visible,
)
from megafuse.model.flex import flex_attend, flex_mask
from megafuse.model.rope import RowRotary, inverse_frequencies


@pytest.fixture
def rng() -> torch.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def arch(scaling: RopeScaling | None) -> ModelArch:
    return ModelArch(
        architecture="LlamaForCausalLM", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2,
        head_dim=16, vocab_size=50, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=5e5,
        rope_scaling=scaling, tie_word_embeddings=True, torch_dtype="float32",
    )  # fmt: skip


SCALINGS = [
    None,
    RopeScaling(8.0, 1.0, 4.0, 8192),
    RopeScaling(32.0, 1.0, 4.0, 8192),
    RopeScaling(4.0, 1.0, 2.0, 100),
    RopeScaling(2.0, 0.5, 8.0, 1024),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_inverse_frequencies_equal_transformers(scaling: RopeScaling | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 5e5}
    if scaling:
        rope = {"rope_type": "llama3", "rope_theta": 5e5, **vars(scaling)}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    ours = inverse_frequencies(arch(scaling))
    assert torch.equal(ours, theirs.inv_freq)
    positions = torch.tensor([0, 1, 7, 3, 4000])
    rotary = RowRotary(arch(scaling), torch.device("cpu"))
    rotary.positions = positions
    cos, sin = (x[0].chunk(2, dim=-1)[0] for x in theirs(torch.zeros(1), positions[None]))
    assert torch.equal(rotary(0)[:, 0, 0], torch.cat((cos, sin), dim=-1))


def test_queries_and_keys_turn_as_in_megatron_core_to_the_bit() -> None:
    """In fp32. In bf16 megatron-core rounds cosines, sines and products, and ours only the result."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    model = arch(None)
    rotary = RowRotary(model, torch.device("cpu"))
    rotary.positions = torch.randint(0, 9000, (7,))
    angles = torch.outer(rotary.positions.float(), rotary.inv_freq).repeat(1, 2)[:, None, None]
    theirs = torch.randn(7, 1, 3, 3 * model.head_dim)[..., : model.head_dim].detach().requires_grad_()
    ours, slope = theirs.detach().clone().requires_grad_(), torch.randn(7, 1, 3, model.head_dim)
    expected, found = _apply_rotary_pos_emb_bshd(theirs, angles), rotate_heads(ours, rotary(0))
    assert torch.equal(found, expected)
    expected.backward(slope)
    found.backward(slope)
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def random_layout(rng: torch.Generator, shared: bool) -> Tensor:
    """Three groups of uneven sizes, then padding. [2, t]"""
    segment, parent, next_id = [], [], 0
    for _ in range(3):
        sizes = torch.randint(1, 6, (4,), generator=rng).tolist()
        prompt = next_id
        for i, size in enumerate(sizes):
            segment += [next_id] * size
            parent += [prompt if shared else next_id] * size
            next_id += 1
            assert shared or i >= 0
    pad = int(torch.randint(0, 4, (), generator=rng))
    return torch.tensor([segment + [-1] * pad, parent + [-1] * pad], dtype=torch.int32)


@pytest.mark.parametrize("shared", [True, False])
def test_visible_means_own_segment_so_far_and_the_whole_parent(rng: torch.Generator, shared: bool) -> None:
    layout = random_layout(rng, shared)
    segment, parent = layout.tolist()
    mask = visible(layout[0], layout[1])
    for q in range(len(segment)):
        for k in range(len(segment)):
            wanted = segment[q] >= 0 and k <= q and segment[k] in (segment[q], parent[q])
            assert bool(mask[q, k]) == wanted


@pytest.mark.parametrize("shared", [True, False])
def test_a_window_counts_positions_not_places(rng: torch.Generator, shared: bool) -> None:
    layout = random_layout(rng, shared)
    segment, parent = layout.tolist()
    positions = row_positions(layout[0], layout[1])
    for place in range(len(segment)):
        if segment[place] < 0:
            continue
        within = segment[:place].count(segment[place])
        prompt = segment.count(parent[place]) if parent[place] != segment[place] else 0
        assert positions[place] == within + prompt
    for window in (1, 2, 4, 100):
        near = positions[:, None] - positions[None, :] < window
        assert torch.equal(visible(layout[0], layout[1], None, window), visible(layout[0], layout[1]) & near)


def row_attention(scale: float, window: int | None = None, softcap: float | None = None) -> RowAttention:
    module = RowAttention.__new__(RowAttention)
    torch.nn.Module.__init__(module)
    module.rows, module.attend, module.scale = RowCache(sdpa_blocks), sdpa_attend, scale
    module.softcap, module.window = softcap, window
    return module


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dense", [0, 64])
def test_row_attention_equals_dense_float64(
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
    dense: int,
    window: int | None,
    softcap: float | None,
) -> None:
    monkeypatch.setattr(attention, "DENSE", dense)
    layout = random_layout(rng, shared)
    t = layout.size(1)
    real = int((layout[0] >= 0).sum())
    q, k, v = (torch.randn(t, 1, h, 8, generator=rng, requires_grad=True) for h in (6, 2, 2))
    out = row_attention(8**-0.5, window, softcap)(q, k, v, layout)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x[:, 0].repeat_interleave(3, dim=1) for x in wide[1:])
    scores = torch.einsum("qhd,khd->hqk", wide[0][:, 0], keys) * 8**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(layout[0], layout[1], None, window)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf"))[:, :real], -1)
    want = torch.einsum("hqk,khd->qhd", weights, values).reshape(real, 48)
    torch.testing.assert_close(out[:real, 0].double(), want, rtol=1e-5, atol=1e-6)
    assert not out[real:].any()

    push = torch.randn(real, 48, generator=rng)
    (out[:real, 0] * push).sum().backward()
    (want * push).sum().backward()
    # a query that sees itself alone has no gradient: two equal sums near 10 cancel, of which float32 knows 1e-6 each
    for ours, theirs in zip((q, k, v), wide):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("dense", [0, 64])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.6), (3, 0.6)])
def test_flex_and_sdpa_see_the_same_keys_from_any_part_of_a_row(
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
    ways: int,
    dense: int,
    window: int | None,
    softcap: float | None,
) -> None:
    monkeypatch.setattr(attention, "DENSE", dense)
    layout = random_layout(rng, shared)
    layout = torch.nn.functional.pad(layout, (0, -layout.size(1) % ways), value=-1)
    t = layout.size(1)
    q, k, v = (torch.randn(1, h, t, 16, generator=rng) for h in (6, 2, 2))
    whole = sdpa_attend(q, k, v, sdpa_blocks(layout[0], layout[1], torch.arange(t), window), 0.25, softcap)
    owner = owners(layout, ways)
    for rank in range(ways):
        places = (owner == rank).nonzero().flatten()
        part = q[:, :, places]
        by_block = sdpa_attend(part, k, v, sdpa_blocks(layout[0], layout[1], places, window), 0.25, softcap)
        by_tile = flex_attend(part, k, v, flex_mask(layout[0], layout[1], places, window), 0.25, softcap)
        torch.testing.assert_close(by_block, whole[:, :, places], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(by_tile, whole[:, :, places], rtol=1e-5, atol=1e-6)


def test_an_empty_row_gives_zeros_and_a_gradient_path() -> None:
    layout = torch.full((2, 4), -1, dtype=torch.int32)
    q, k, v = (torch.randn(4, 1, 2, 8, requires_grad=True) for _ in range(3))
    out = row_attention(1.0)(q, k, v, layout)
    assert out.shape == (4, 1, 16) and not out.any() and out.requires_grad


def test_views_are_built_once_a_row_and_never_mixed_up(rng: torch.Generator) -> None:
    cache = RowCache(sdpa_blocks, capacity=2)
    rows = [random_layout(rng, True) for _ in range(5)]
    for row in rows:
        assert cache.get(row, 0) is cache.get(row.detach(), 0)
        fresh = sdpa_blocks(row[0], row[1], torch.arange(row.size(1)))
        assert [b.spans for b in cache.get(row, 0).mask] == [b.spans for b in fresh]
    assert cache.get(rows[0], 0, window=2) is not cache.get(rows[0], 0)


def test_a_long_group_is_one_call_a_response_and_no_response_pays_for_another() -> None:
    sizes = [100, 40, 30]
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).int()
    blocks = sdpa_blocks(segment, torch.zeros_like(segment), torch.arange(170))
    assert [b.spans for b in blocks] == [((0, 100),), ((0, 100), (100, 140)), ((0, 100), (140, 170))]
    assert [None if b.mask is None else tuple(b.mask.shape) for b in blocks] == [None, (1, 1, 40, 140), (1, 1, 30, 130)]


@pytest.mark.parametrize("own", [{"window": 8, "window_layers": (0,)}, {"attention_softcap": 50.0}])
def test_transformer_engine_is_refused_what_it_cannot_compute(own: dict[str, Any]) -> None:
    assert core_attention("te", arch(None)) is None
    with pytest.raises(ConfigError, match="neither the window nor the softcap"):
        core_attention("te", replace(arch(None), **own))


def test_each_layer_has_its_own_window() -> None:
    attention = core_attention("sdpa", replace(arch(None), window=8, window_layers=(0,)))
    assert [attention.keywords["window_of"](layer) for layer in (0, 1)] == [8, None]
