"""Keys that published models carry and that cannot change the forward pass: taken, bounded, and proven so."""

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megafuse.converters.family import KERNEL_KEYS
from megafuse.converters.hf_config import FIXED, GENERATION, HARMLESS, TRANSLATED, parse_hf_config
from megafuse.converters.maps import FAMILIES
from megafuse.errors import UnsupportedModelError
from megafuse.testing.families import WRITERS

NAMES = {name: cls for cls in FAMILIES for name in WRITERS if FAMILIES[cls].model_type == name}
# What to_dict() of transformers 4.34 to 4.57 wrote beside a model's own numbers (the values are its defaults).
TRANSFORMERS_4 = {
    "_commit_hash": None,
    "_flash_attn_2_enabled": False,
    "_name_or_path": "somebody/some-model",
    "add_cross_attention": False,
    "attn_implementation": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "transformers_version": "4.39.0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# Whose it is, and what its config.json has beside the numbers of its family.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen 2.5 base, R1-Distill-Qwen": ("qwen2", {"use_mrope": False, "use_sliding_window": False}),
    "Zephyr, trained with flash attention": ("mistral", {"_flash_attn_2_enabled": True, "pad_token_id": 2}),
    "an early Llama": ("llama", {"max_sequence_length": 2048, "pad_token_id": -1, "pretraining_tp": 1}),
    "a Llama of another trainer": ("llama", {"activation": "swiglu", "gradient_checkpointing": False}),
    "Gemma 2, tuned": ("gemma2", {"attn_implementation": "eager", "cache_implementation": "hybrid"}),
    "a Llama 2 chat": ("llama", {"max_length": 4096, "do_sample": True, "temperature": 0.9, "top_p": 0.6}),
    "Mixtral": ("mixtral", {"output_router_logits": False, "router_aux_loss_coef": 0.02, "unk_token_id": 0}),
    "Qwen 3": ("qwen3", {"max_window_layers": 28, "use_sliding_window": False, "_attn_implementation": "eager"}),
    "Qwen 3 MoE": ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_mrope": None}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name, seed=seed, layers=2) for name, write in WRITERS.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path, kernel: str = "eager") -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("title", [*PUBLISHED, *(f"{name}, all that transformers 4 wrote" for name in WRITERS)])
def test_what_is_taken_changes_no_logit(models: dict[str, Path], title: str, tmp_path: Path) -> None:
    family, more = PUBLISHED.get(title) or (title.partition(",")[0], TRANSFORMERS_4)
    plain = config_of(models[family])
    assert parse_hf_config(plain | more) == parse_hf_config(plain)
    for file in models[family].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(plain | more))
    assert torch.equal(logits(tmp_path), logits(models[family]))


@pytest.mark.parametrize("name", WRITERS)
def test_kernels_that_are_taken_compute_one_function(models: dict[str, Path], name: str) -> None:
    """In fp32 they are as far apart as sums in other orders; Gemma 2's caps, which sdpa lacks, are not lost."""
    plain, eager = config_of(models[name]), logits(models[name])
    for kernel in ("sdpa", "flex_attention"):
        for key in KERNEL_KEYS:
            if (name, kernel) == ("gemma2", "sdpa"):
                with pytest.raises(UnsupportedModelError, match=f'{key} = "sdpa"'):
                    parse_hf_config(plain | {key: kernel})
            else:
                assert parse_hf_config(plain | {key: kernel}) == parse_hf_config(plain)
        if (name, kernel) != ("gemma2", "sdpa"):
            apart = (logits(models[name], kernel) - eager).abs().max()
            assert apart <= 1e-5 * eager.abs().max()


@pytest.mark.parametrize("name", WRITERS)
def test_transformers_models_read_nothing_that_is_called_harmless(name: str) -> None:
    """But for the padding row, of which only the gradient depends, and losses and weights at their start."""
    module = inspect.getmodule(getattr(transformers, NAMES[name]))
    assert module is not None
    read = set(re.findall(r"\bconfig\.([a-z_]\w*)", inspect.getsource(module)))
    assert {"hidden_size", "rms_norm_eps", "num_attention_heads"} <= read
    rules = FAMILIES[NAMES[name]]
    loose = (HARMLESS | rules.harmless) - set(rules.fixed) - rules.translated
    assert read & loose <= {
        "pad_token_id",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "sliding_window",  # of Qwen's: windows by layer_types, which must all be full
    }


def test_every_setting_of_generate_is_known() -> None:
    """transformers' own list, of what it takes out of every config.json that it reads."""
    assert set(transformers.GenerationConfig._get_default_generation_params()) <= GENERATION
    assert not GENERATION & (set(FIXED) | TRANSLATED)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {"use_mrope": True}),
        ("qwen2", {"use_mrope": 0}),
        ("llama", {"activation": "gelu"}),
        ("llama", {"activation": "geglu"}),
        ("gemma2", {"activation": "swiglu"}),
        ("llama", {"_flash_attn_2_enabled": "yes"}),
        ("gemma2", {"attn_implementation": "tree_attention"}),
        ("gemma2", {"_attn_implementation": "linear"}),
        ("llama", {"is_decoder": True}),
        ("llama", {"pruned_heads": {"0": [1]}}),
        ("llama", {"add_cross_attention": True}),
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"alibi": False}),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 4}}),
        ("mixtral", {"num_experts_per_token": 2}),
    ],
)
def test_what_could_change_it_is_refused_by_name(models: dict[str, Path], family: str, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"{next(iter(change))} = ")):
        parse_hf_config(config_of(models[family]) | change)
