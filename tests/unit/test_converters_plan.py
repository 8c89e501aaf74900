"""The table and the plan: every byte once, and every rank's slices as an independent computation gives them."""

import json
import struct
import time
from dataclasses import replace

import pytest
import torch

from megafuse.converters.layouts import rank_state_dict, stage_layers
from megafuse.converters.maps import find, register
from megafuse.converters.maps.llama import TABLE as LLAMA
from megafuse.converters.plan import Plan, check_bijection
from megafuse.converters.safetensors_io import SafetensorsFolder
from megafuse.converters.table import Arch, Hf, Row
from megafuse.errors import ConfigError, IntegrityError, UnsupportedModelError
from megafuse.model.arch import ModelArch

TINY = ModelArch(
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=36,
    num_heads=12,
    num_kv_heads=6,
    head_dim=4,
    vocab_size=50,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=False,
    torch_dtype="float32",
)
BIG = {  # layers, hidden, MLP, heads, KV heads, vocabulary, parameters of the published models
    "8b": (32, 4096, 14336, 32, 8, 128256, 8_030_261_248),
    "70b": (80, 8192, 28672, 64, 8, 128256, 70_553_706_496),
}


def hf_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Written out by hand, not from the table."""
    h, q, k = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes = {"model.embed_tokens.weight": (arch.vocab_size, h), "model.norm.weight": (h,)}
    for i in range(arch.num_layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (r, h) for n, r in (("q", q), ("k", k), ("v", k))}
        shapes |= {p + "self_attn.o_proj.weight": (h, q), p + "mlp.down_proj.weight": (h, arch.ffn_hidden_size)}
        shapes |= {p + f"mlp.{n}_proj.weight": (arch.ffn_hidden_size, h) for n in ("gate", "up")}
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, h)
    return shapes


class Tensors:
    """A view of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def dtype(self, name):
        return {torch.float32: "F32", torch.bfloat16: "BF16"}[self.tensors[name].dtype]

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, start, stop, out):
        part = self.tensors[name][start:stop].contiguous()
        out[:] = bytes(part.view(-1).view(torch.uint8).numpy())


def random_model(arch: ModelArch) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in hf_shapes(arch).items()}


def expected(arch, hf, tp, t, layers, first, last, padded):
    """One rank's parameters by reshaping whole tensors, as megatron-core's documentation describes the layout."""
    pad = lambda w: torch.cat((w, w.new_zeros(padded - w.shape[0], w.shape[1]))).chunk(tp)[t]  # noqa: E731
    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = pad(hf["model.embed_tokens.weight"])
    for local, i in enumerate(layers):
        p, m = f"model.layers.{i}.", f"decoder.layers.{local}."
        groups = arch.num_kv_heads
        q, k, v = (hf[p + f"self_attn.{n}_proj.weight"].reshape(groups, -1, arch.hidden_size) for n in "qkv")
        qkv = torch.cat((q, k, v), dim=1)  # [groups, (q per group + 2) * head_dim, hidden]
        out[m + "self_attention.linear_qkv.layer_norm_weight"] = hf[p + "input_layernorm.weight"]
        out[m + "self_attention.linear_qkv.weight"] = qkv.chunk(tp)[t].reshape(-1, arch.hidden_size)
        out[m + "self_attention.linear_proj.weight"] = hf[p + "self_attn.o_proj.weight"].chunk(tp, 1)[t]
        out[m + "mlp.linear_fc1.layer_norm_weight"] = hf[p + "post_attention_layernorm.weight"]
        halves = [hf[p + f"mlp.{n}_proj.weight"].chunk(tp)[t] for n in ("gate", "up")]
        out[m + "mlp.linear_fc1.weight"] = torch.cat(halves)
        out[m + "mlp.linear_fc2.weight"] = hf[p + "mlp.down_proj.weight"].chunk(tp, 1)[t]
    if last:
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not arch.tie_word_embeddings:
            out["output_layer.weight"] = pad(hf["lm_head.weight"])
        elif not first:
            out["output_layer.weight"] = pad(hf["model.embed_tokens.weight"])
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (1, 4, 1), (6, 1, 1), (2, 2, 2)])
def test_every_rank_gets_its_slices(tp, pp, vpp, tied):
    arch = replace(TINY, tie_word_embeddings=tied)
    hf, plan = random_model(arch), Plan(arch)
    padded = -(-arch.vocab_size // tp) * tp
    seen = []
    for t in range(tp):
        for p in range(pp):
            for v in range(vpp):
                layers = [i for i in range(4) if i // (4 // (pp * vpp)) == v * pp + p]
                seen += layers if t == 0 else []
                want = expected(arch, hf, tp, t, layers, p + v == 0, p == pp - 1 and v == vpp - 1, padded)
                got = dict(
                    rank_state_dict(
                        plan, Tensors(hf), tp=tp, tp_rank=t, pp=pp, pp_rank=p, vpp=vpp, vpp_rank=v, padded_vocab=padded
                    )
                )
                assert got.keys() == want.keys()
                for name, tensor in want.items():
                    assert torch.equal(got[name], tensor), name
    assert sorted(seen) == list(range(4))


def test_layouts_that_do_not_divide_are_refused():
    plan, view = Plan(TINY), Tensors(random_model(TINY))
    with pytest.raises(ConfigError, match="KV heads: 6 is not divisible by tensor parallelism 4"):
        list(rank_state_dict(plan, view, tp=4, padded_vocab=52))
    with pytest.raises(ConfigError, match=r"50 is not divisible|embedding.*not divisible"):
        list(rank_state_dict(plan, view, tp=3))
    with pytest.raises(ConfigError, match="4 layers do not divide"):
        stage_layers(4, 3, 0)


@pytest.mark.parametrize("size", BIG)
@pytest.mark.parametrize("tied", [False, True])
def test_published_shapes_from_headers_alone(tmp_path, size, tied):
    """Sparse files with true headers: the whole plan of 70B parameters is checked without a single weight."""
    layers, hidden, ffn, heads, kv, vocab, parameters = BIG[size]
    arch = replace(
        TINY, num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_heads=heads, num_kv_heads=kv,
        head_dim=hidden // heads, vocab_size=vocab, tie_word_embeddings=tied, torch_dtype="bfloat16",
    )  # fmt: skip
    weight_map, shapes = {}, list(hf_shapes(arch).items())
    for shard in range(8):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shapes[shard::8]:
            nbytes = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
            weight_map[name] = f"model-{shard + 1:05d}-of-00008.safetensors"
            at += nbytes
        text = json.dumps(header).encode()
        with open(tmp_path / f"model-{shard + 1:05d}-of-00008.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    began = time.process_time()  # not the clock: the machine may be busy
    plan = Plan(arch)
    with SafetensorsFolder(tmp_path) as shards:
        plan.check(shards, where="fixture")
    assert time.process_time() - began < 5
    assert plan.hf_shapes == dict(shapes)
    assert plan.parameters == parameters - (vocab * hidden if tied else 0)


def bad_table(**changes) -> Arch:
    """The Llama table with one row changed."""
    rows = [replace(row, **changes) if row.mcore.endswith("linear_qkv.weight") else row for row in LLAMA.rows]
    return replace(LLAMA, rows=tuple(rows))


def test_a_table_that_loses_or_repeats_bytes_is_no_plan():
    q, k, v = next(row for row in LLAMA.rows if row.pack == "grouped").hf
    with pytest.raises(IntegrityError, match="used twice"):
        Plan(TINY, bad_table(hf=(q, k, v, Hf("model.layers.{i}.mlp.gate_proj.weight", "FH"))))
    with pytest.raises(IntegrityError, match="widths"):
        Plan(TINY, bad_table(hf=(q, k, Hf("model.layers.{i}.other.weight", "KF"))))
    wrong = Plan(TINY)
    wrong.pieces["model.norm.weight"][0] = replace(wrong.pieces["model.norm.weight"][0], rows=23)
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight: 23 of 24 rows"):
        check_bijection(wrong)


def test_check_names_what_is_unknown_missing_or_misshapen():
    plan, hf = Plan(TINY), random_model(TINY)
    plan.check(Tensors({**hf, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}), where="here")
    with pytest.raises(UnsupportedModelError, match=r"would be lost: model\.layers\.0\.mlp\.gate\.bias"):
        plan.check(Tensors({**hf, "model.layers.0.mlp.gate.bias": torch.ones(2)}), where="here")
    with pytest.raises(IntegrityError, match=r"1 tensors are missing: lm_head\.weight"):
        plan.check(Tensors({k: v for k, v in hf.items() if k != "lm_head.weight"}), where="here")
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight has shape \[25\]"):
        plan.check(Tensors({**hf, "model.norm.weight": torch.ones(25)}), where="here")
    with pytest.raises(UnsupportedModelError, match="BF16, but other parts"):
        mixed = hf["model.layers.2.self_attn.k_proj.weight"].bfloat16()
        plan.check(Tensors({**hf, "model.layers.2.self_attn.k_proj.weight": mixed}), where="here")


def test_architectures_are_rows():
    """A new architecture is a new table; nothing else has to know."""
    rows = (Row("embedding.word_embeddings.weight", (Hf("wte.weight", "VH"),), tp=0, stage="first"),)
    arch = register(Arch("ToyForCausalLM", rows, extra_states=()))
    toy = Plan(replace(TINY, architecture="ToyForCausalLM"))
    assert toy.hf_shapes == {"wte.weight": (50, 24)} and find("ToyForCausalLM") is arch
    assert register(Arch("ToyForCausalLM", rows, extra_states=())) == arch
    with pytest.raises(ConfigError, match="registered already"):
        register(Arch("ToyForCausalLM", (), extra_states=()))
    with pytest.raises(UnsupportedModelError, match=r"known: .*LlamaForCausalLM"):
        find("NobodyForCausalLM")
