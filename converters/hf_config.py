"""config.json -> ModelArch, by allow-list.

A weight that is copied exactly still gives a wrong model when one number of the configuration is lost: rope scaling,
epsilon, a bias, a window. So every key is either translated, required to have the one value that megafuse implements,
or listed as unable to change the forward pass. Anything else is an UnsupportedModelError, never a default.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from megafuse.converters.config_values import flag, positive_float, positive_int, refuse, same
from megafuse.converters.family import KERNEL_KEYS, KERNELS, Family
from megafuse.converters.formats import refuse_other_formats
from megafuse.converters.maps import FAMILIES
from megafuse.converters.safetensors_io import unique_keys
from megafuse.errors import ConfigError, UnsupportedModelError
from megafuse.model.arch import ModelArch, RopeScaling

# Sizes that must be present: a silent default here would be another model.
SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
# Translated below, with the default of transformers' LlamaConfig where the key may be absent.
TRANSLATED = {
    *SIZES,
    "architectures",
    "dtype",
    "head_dim",
    "model_type",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
}
# Keys that change the forward pass: only these values are implemented. null means "absent" in every config.json.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation": ("swiglu",),  # what hidden_act = silu and a gate are together; no class of transformers reads it
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu", "swish"),
    "is_decoder": (False,),  # transformers' default; the causal class ignores it
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "layer_types": (None,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False, None),  # positions of images and time, of Qwen's models that see; text alone has one position
    "use_sliding_window": (False, None),
}
FIXED |= dict.fromkeys(KERNEL_KEYS, KERNELS) | {"_flash_attn_2_enabled": (True, False, None)}  # of transformers 4.35
# Settings of generate(), which transformers 4 wrote into config.json and transformers 5 drops when it reads one: they
# choose among the logits that the forward pass has given.
GENERATION = {
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
}
# Keys about files, other programs, other losses and the Python objects around the model.
HARMLESS = GENERATION | {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",  # what the backward pass keeps
    "id2label",
    "initializer_range",
    "label2id",
    "max_sequence_length",  # Llama's of early 2023, beside max_position_embeddings: nothing reads it
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
}


DTYPES = ("bfloat16", "float16", "float32")
ROPE_TYPES = ("default", "llama3")
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_hf_config(folder: str | Path) -> ModelArch:
    """Translate `folder/config.json`.

    Raises ConfigError where the file is missing or is no JSON object, UnsupportedModelError (naming key, value and the
    known ones) for what no rule covers.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        refuse_other_formats(path.parent)
        raise ConfigError(
            f"{path} does not exist; fix: give a Hugging Face model folder or a converted checkpoint"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not an object")
    return parse_hf_config(config)


def parse_hf_config(config: Mapping[str, Any]) -> ModelArch:
    """Translate the contents of a config.json; see `read_hf_config`."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _check_keys(config, family)
    sizes = {field: positive_int(config, key) for key, field in SIZES.items()}
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    kv_heads = positive_int(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, (f"a divisor of num_attention_heads={heads}",))
    if config.get("head_dim") is None and hidden % heads:
        refuse("hidden_size", hidden, (f"a multiple of num_attention_heads={heads}, or an explicit head_dim",))
    theta, scaling = _rope(config, family.rope_theta)
    return ModelArch(
        architecture=architecture,
        num_kv_heads=kv_heads,
        head_dim=positive_int(config, "head_dim", default=hidden // heads),
        rms_norm_eps=positive_float(config, "rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=flag(config, "tie_word_embeddings", default=family.tied),
        torch_dtype=_dtype(config),
        num_layers=sizes["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=sizes["ffn_hidden_size"],
        num_heads=heads,
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_position_embeddings"],
        **family.fields(config),
    )


def _check_keys(config: Mapping[str, Any], family: Family) -> None:
    """Every key by its rule; the family's rules come before the shared ones."""
    fixed = {**FIXED, **family.fixed}
    own = family.translated | family.harmless
    for key, value in config.items():
        if key in fixed and key not in own:
            if not any(same(value, allowed) for allowed in fixed[key]):
                refuse(key, value, fixed[key])
        elif key not in TRANSLATED | HARMLESS | own:
            _refuse_key(key, value, TRANSLATED | set(fixed) | own)
    for key in family.explicit:
        if config.get(key) is None:
            refuse(key, None, ("an explicit value: its default differs from program to program",))
    for key in family.present:
        if key not in config:
            refuse(key, None, ("an explicit value or null: its default differs from program to program",))


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        refuse("architectures", names, tuple([name] for name in FAMILIES))
    model_type = FAMILIES[names[0]].model_type
    if config.get("model_type") != model_type:
        refuse("model_type", config.get("model_type"), (model_type,))
    return str(names[0])


def _dtype(config: Mapping[str, Any]) -> str:
    """`torch_dtype` (transformers 4) or `dtype` (5); float32 where neither is given, as transformers does."""
    found = {str(config[key]) for key in ("torch_dtype", "dtype") if config.get(key) is not None}
    if len(found) > 1:
        raise UnsupportedModelError(f"config.json: torch_dtype and dtype disagree: {sorted(found)}; fix: keep one")
    name = found.pop() if found else "float32"
    if name not in DTYPES:
        refuse("dtype", name, DTYPES)
    return name


def _rope(config: Mapping[str, Any], otherwise: float) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    both = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    for value in both:
        if not isinstance(value, dict):
            refuse("rope_parameters", value, ("an object", None))
    if len(both) == 2:
        old, new = ({k: v for k, v in value.items() if k != "rope_theta"} for value in both)
        if old != new:
            raise UnsupportedModelError(
                f"config.json: rope_scaling={old} and rope_parameters={new} disagree; fix: keep the one that is meant"
            )
    rope = dict(both[-1]) if both else {}
    bases = [s["rope_theta"] for s in (config, *both) if s.get("rope_theta") is not None]
    if any(base != bases[0] for base in bases):
        raise UnsupportedModelError(f"config.json: rope_theta is given with different values {bases}; fix: keep one")
    theta = positive_float({"rope_theta": bases[0]} if bases else {}, "rope_theta", default=otherwise)
    rope.pop("rope_theta", None)

    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope}
    if len(kinds) > 1 or not kinds <= set(ROPE_TYPES):
        refuse("rope_type", sorted(map(str, kinds)), ROPE_TYPES)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", "not 1", (1.0,))
    if kinds != {"llama3"}:
        if rope:  # a factor without a type: transformers would ignore it, the author meant something
            refuse("rope_parameters", rope, ("{} besides rope_theta for rope_type default",))
        return theta, None
    if set(rope) != set(LLAMA3_KEYS):
        refuse("rope_parameters", rope, ("exactly " + ", ".join(LLAMA3_KEYS),))
    low, high = (positive_float(rope, key) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:  # the interpolation would divide by zero or run backwards
        refuse("high_freq_factor", high, (f"greater than low_freq_factor={low}",))
    original = positive_int(rope, "original_max_position_embeddings")
    return theta, RopeScaling(positive_float(rope, "factor"), low, high, original)


def _refuse_key(key: str, value: Any, known: set[str]) -> NoReturn:
    raise UnsupportedModelError(
        f"config.json: unknown key {key} = {json.dumps(value)}: it could change the forward pass, no rule says how; "
        f"known: {', '.join(sorted(known))}; "
        f"if it cannot change the forward pass, add it to HARMLESS in converters/hf_config.py"
    )
