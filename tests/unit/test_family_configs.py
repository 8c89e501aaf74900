"""Qwen 2.5, Mistral, Mixtral, Gemma 2: config.json as published and as transformers saves it; the rest is refused."""

import json

import pytest

from megafuse.converters.hf_config import parse_hf_config
from megafuse.converters.plan import Plan
from megafuse.errors import UnsupportedModelError

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
}
QWEN25 = COMMON | {  # the form of the published 7B
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MISTRAL = COMMON | {  # 7B v0.1
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
MIXTRAL = MISTRAL | {  # 8x7B
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
GEMMA2 = {  # 9B
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(QWEN25, 7_615_616_512), (MISTRAL, 7_241_732_096), (MIXTRAL, 46_702_792_704), (GEMMA2, 9_241_705_984)],
)
def test_published_models(tmp_path, config, parameters):
    transformers = pytest.importorskip("transformers")
    arch = parse_hf_config(config)
    assert Plan(arch).parameters == parameters
    cls = getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))
    cls(**config).save_pretrained(tmp_path)
    assert parse_hf_config(json.loads((tmp_path / "config.json").read_text())) == arch


def test_what_each_is():
    qwen, mistral, mixtral, gemma = map(parse_hf_config, (QWEN25, MISTRAL, MIXTRAL, GEMMA2))
    assert qwen.qkv_bias and qwen.window is None and not mistral.qkv_bias
    assert mistral.window_of(0) == mistral.window_of(31) == 4096
    assert mixtral.window_of(0) is None and (mixtral.num_experts, mixtral.experts_per_token) == (8, 2)
    assert mixtral.moe_ffn_hidden_size == 14336 and mixtral.norm_topk_prob
    assert [gemma.window_of(i) for i in range(4)] == [4096, None, 4096, None]
    assert (gemma.attention_softcap, gemma.final_softcap, gemma.attention_scale) == (50.0, 30.0, 1 / 16)
    assert gemma.embedding_scale == pytest.approx(59.8665, abs=1e-4) and gemma.activation == "gelu_tanh"
    assert gemma.sandwich_norms and gemma.zero_centred_norms and gemma.tie_word_embeddings
    uncapped = parse_hf_config(GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert uncapped.attention_softcap is uncapped.final_softcap is None
    kinds = ["full_attention", *["sliding_attention"] * 41]
    assert parse_hf_config(GEMMA2 | {"layer_types": kinds}).window_layers == tuple(range(1, 42))
    assert parse_hf_config({k: v for k, v in MIXTRAL.items() if k != "rope_theta"}).rope_theta == 1e6
    assert parse_hf_config(MISTRAL | {"sliding_window": None}).window_of(0) is None


def without(config, key):
    return {k: v for k, v in config.items() if k != key}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (QWEN25 | {"use_sliding_window": True}, "use_sliding_window = true"),
        (QWEN25 | {"attention_bias": True}, "attention_bias = true"),
        (QWEN25 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        (QWEN25 | {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        (without(QWEN25, "num_key_value_heads"), "num_key_value_heads = null"),
        (without(MISTRAL, "sliding_window"), "sliding_window = null"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window = 0"),
        (MISTRAL | {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (MISTRAL | {"num_local_experts": 8}, "unknown key num_local_experts"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "at most num_experts=8"),
        (without(MIXTRAL, "rms_norm_eps"), "rms_norm_eps = null"),
        (GEMMA2 | {"hidden_activation": "gelu"}, 'hidden_activation = "gelu"'),
        (GEMMA2 | {"hidden_act": "silu"}, 'hidden_act = "silu"'),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2 | {"sliding_window_size": 1024}, "sliding_window_size = 1024"),
        (GEMMA2 | {"layer_types": ["full_attention"]}, "42 times"),
        (GEMMA2 | {"layer_types": ["chunked_attention"] * 42}, "layer_types"),
        (GEMMA2 | {"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0"),
        (without(GEMMA2, "attn_logit_softcapping"), "attn_logit_softcapping"),
        (without(GEMMA2, "final_logit_softcapping"), "final_logit_softcapping"),
        (without(GEMMA2, "query_pre_attn_scalar"), "query_pre_attn_scalar = null"),
        (without(GEMMA2, "sliding_window"), "sliding_window = null"),
        (GEMMA2 | {"final_logit_scale": 2.0}, "unknown key final_logit_scale"),
    ],
)
def test_refused(config, named):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_hf_config(config)
    assert named in str(caught.value)
