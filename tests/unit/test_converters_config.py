"""config.json -> ModelArch: translated, required, harmless, or refused; nothing is defaulted in silence."""

import json

import pytest

from megafuse.converters.hf_config import parse_hf_config, read_hf_config
from megafuse.errors import ConfigError, UnsupportedModelError
from megafuse.model.arch import RopeScaling, read_arch

LLAMA2 = {  # the form of 2023: no head_dim, no KV heads, no rope_theta
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "use_cache": True,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.31.0.dev0",
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = {
    **LLAMA2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def transformers5(config: dict) -> dict:
    """The same configuration as transformers 5 saves it."""
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {"rope_type": "default"})}
    return {**new, "rope_parameters": rope, "dtype": config["torch_dtype"], "head_dim": 128}


def test_llama2_defaults():
    arch = parse_hf_config(LLAMA2)
    assert (arch.num_kv_heads, arch.head_dim, arch.rope_theta, arch.rope_scaling) == (32, 128, 10000.0, None)
    assert (arch.torch_dtype, arch.ffn_hidden_size, arch.num_layers) == ("float16", 11008, 32)


def test_both_spellings_give_the_same_architecture():
    arch = parse_hf_config(LLAMA31)
    assert arch.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert arch.rope_theta == 500000.0
    assert parse_hf_config(transformers5(LLAMA31)) == arch
    plain = {**LLAMA31, "rope_scaling": None}
    assert parse_hf_config(transformers5(plain)) == parse_hf_config(plain)
    assert parse_hf_config(plain).rope_scaling is None


def test_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    for config in (LLAMA2, LLAMA31, transformers5(LLAMA31)):
        theirs, ours = transformers.LlamaConfig(**config), parse_hf_config(config)
        rope = theirs.rope_parameters
        assert (theirs.head_dim, theirs.num_key_value_heads) == (ours.head_dim, ours.num_kv_heads)
        assert (rope["rope_theta"], theirs.rms_norm_eps) == (ours.rope_theta, ours.rms_norm_eps)
        assert (rope["rope_type"] == "llama3") == (ours.rope_scaling is not None)
        if ours.rope_scaling:
            assert rope["factor"] == ours.rope_scaling.factor
        assert parse_hf_config(
            json.loads(theirs.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": 0}, "attention_bias"),  # 0 is not false
        ({"hidden_act": "gelu"}, '"gelu"'),
        ({"attention_multiplier": 0.5}, "attention_multiplier = 0.5"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_scaling": SCALING | {"attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": {k: v for k, v in SCALING.items() if k != "factor"}}, "exactly factor"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1.0}}, "greater than low_freq_factor"),
        ({"rope_scaling": [1]}, "an object"),
        ({"rope_scaling": SCALING, "rope_parameters": SCALING | {"factor": 32.0}}, "disagree"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_theta": 5e5}, "different values"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"num_key_value_heads": 5}, "a divisor"),
        ({"hidden_size": 4097}, "a multiple"),
        ({"vocab_size": "32000"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"architectures": ["PhiForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "disagree"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_refused(change, named):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_hf_config({**LLAMA2, **change})
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_key_is_named_with_the_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"unknown key logit_scale = 2\.0.*rms_norm_eps"):
        parse_hf_config({**LLAMA2, "logit_scale": 2.0})


def test_read_from_either_folder(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA31))
    assert read_arch(tmp_path) == read_arch(tmp_path / "hf") == parse_hf_config(LLAMA31)
    with pytest.raises(ConfigError, match="does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="list"):
        read_hf_config(tmp_path)
