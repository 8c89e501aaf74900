"""Qwen3 and Qwen3-MoE: config.json as published and as transformers saves it; what is not implemented is refused."""

import json

import pytest

from megafuse.converters.hf_config import parse_hf_config
from megafuse.converters.plan import Plan
from megafuse.errors import UnsupportedModelError

DENSE = {  # the form of the published 8B
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SPARSE = {  # the form of the published 30B with 3B active
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def test_published_models():
    dense, sparse = parse_hf_config(DENSE), parse_hf_config(SPARSE)
    assert dense.qk_norm and dense.num_experts is None and dense.head_dim == 128 and dense.rope_theta == 1e6
    assert (sparse.num_experts, sparse.experts_per_token, sparse.moe_ffn_hidden_size) == (128, 8, 768)
    assert sparse.qk_norm and sparse.norm_topk_prob and sparse.num_heads * sparse.head_dim == 2 * sparse.hidden_size
    assert Plan(dense).parameters == 8_190_735_360
    assert Plan(sparse).parameters == 30_532_122_624


def test_what_transformers_saves_is_the_same_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    for config, cls in ((DENSE, transformers.Qwen3Config), (SPARSE, transformers.Qwen3MoeConfig)):
        cls(**config).save_pretrained(tmp_path)
        assert parse_hf_config(json.loads((tmp_path / "config.json").read_text())) == parse_hf_config(config)


def test_harmless_here_and_nowhere_else():
    assert parse_hf_config(DENSE | {"sliding_window": 4096}) == parse_hf_config(DENSE)
    assert parse_hf_config(SPARSE | {"router_aux_loss_coef": 0.1, "output_router_logits": True}).num_experts == 128
    with pytest.raises(UnsupportedModelError, match="unknown key router_aux_loss_coef"):
        parse_hf_config(DENSE | {"router_aux_loss_coef": 0.1})
    llama = {k: v for k, v in DENSE.items() if k not in ("max_window_layers", "sliding_window")}
    llama |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert not parse_hf_config(llama).qk_norm
    for change in ({"num_experts": 8}, {"max_window_layers": 1}, {"sliding_window": 4096}, {"mlp_only_layers": []}):
        with pytest.raises(UnsupportedModelError, match=next(iter(change))):
            parse_hf_config(llama | change)


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (DENSE, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window = true"),
        (DENSE, {"attention_bias": True}, "attention_bias = true"),
        (DENSE, {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types"),
        (DENSE, {"head_dim": None}, "head_dim = null"),
        (DENSE, {"num_key_value_heads": None}, "num_key_value_heads = null"),
        (DENSE, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (DENSE, {"num_experts": 8}, "unknown key num_experts = 8"),
        (DENSE, {"model_type": "qwen3_moe"}, "model_type"),
        (SPARSE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (SPARSE, {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        (SPARSE, {"shared_expert_intermediate_size": 512}, "unknown key shared_expert_intermediate_size = 512"),
        (SPARSE, {"norm_topk_prob": None}, "norm_topk_prob = null"),
        (SPARSE, {"norm_topk_prob": 1}, "norm_topk_prob = 1"),
        (SPARSE, {"num_experts": 0}, "num_experts = 0"),
        (SPARSE, {"num_experts": None}, "num_experts = null"),
        (SPARSE, {"num_local_experts": 64}, "disagree"),
        (SPARSE, {"num_experts_per_tok": 129}, "at most num_experts=128"),
        (SPARSE, {"num_experts_per_tok": 1}, "at least 2"),
        (SPARSE, {"moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_refused(base, change, named):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_hf_config({**base, **change})
    assert named in str(caught.value)


def test_a_router_of_one_expert_a_token_without_normalising():
    assert parse_hf_config(SPARSE | {"num_experts_per_tok": 1, "norm_topk_prob": False}).experts_per_token == 1
