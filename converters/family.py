"""What config.json may say in one family of models: the rules that each map in `converters/maps` fills in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megafuse.converters.config_values import positive_int, refuse
from megafuse.errors import UnsupportedModelError

Fields = Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> the family's own fields of ModelArch
WINDOWED, FULL = "sliding_attention", "full_attention"
# Which kernel transformers computes attention with: one function, whichever of these it is.
KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None)
KERNEL_KEYS = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")


def no_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing besides what all families share."""
    return {}


@dataclass(frozen=True)
class Family:
    """An architecture's own keys, beside those that all share (`hf_config`).

    Attributes:
        model_type: what config.json must call it.
        translated: keys that `fields` reads.
        fixed: keys of which only these values are implemented; they take the place of the shared rule.
        harmless: keys that cannot change the forward pass as the other rules leave it.
        explicit: keys that must be there with a value, since their default differs from program to program.
        present: keys that must be there, where null means something else than absent.
        fields: reads what is the family's own.
        rope_theta: transformers' default for this family.
        tied: the same of `tie_word_embeddings`.
    """

    model_type: str
    translated: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    explicit: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    fields: Fields = no_fields
    rope_theta: float = 10000.0
    tied: bool = False


def layer_types(config: Mapping[str, Any], *, otherwise: Callable[[int], str]) -> list[str]:
    """`layer_types` of config.json; where it is absent or null, what `otherwise` says of each layer.

    Raises UnsupportedModelError for another length or a kind of attention that is not implemented.
    """
    layers, kinds = positive_int(config, "num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        return [otherwise(layer) for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {WINDOWED, FULL}:
        refuse("layer_types", kinds, (f"{layers} times {FULL} or {WINDOWED}",))
    return kinds


def refuse_windows(config: Mapping[str, Any]) -> None:
    """Every layer sees everything before it. Raises UnsupportedModelError for a `layer_types` that says otherwise."""
    kinds = config.get("layer_types")
    full = [FULL] * positive_int(config, "num_hidden_layers")
    if kinds is not None and kinds != full:
        refuse("layer_types", kinds, (full, None))


def window_everywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` of all layers, null for none."""
    if config.get("sliding_window") is None:
        return {}
    window, layers = positive_int(config, "sliding_window"), positive_int(config, "num_hidden_layers")
    return {"window": window, "window_layers": tuple(range(layers))}


def experts(config: Mapping[str, Any], *, width: str, normalised: bool) -> dict[str, Any]:
    """The fields of ModelArch about experts; `width` is the key of an expert's MLP width.

    transformers 5 saves `num_experts` as `num_local_experts`.
    """
    counts = {key: positive_int(config, key) for key in ("num_experts", "num_local_experts") if key in config}
    if len(set(counts.values())) > 1:
        raise UnsupportedModelError(f"config.json: {counts} disagree; fix: keep the one that is meant")
    count = next(iter(counts.values())) if counts else positive_int(config, "num_experts")
    chosen = positive_int(config, "num_experts_per_tok")
    if chosen > count:
        refuse("num_experts_per_tok", chosen, (f"at most num_experts={count}",))
    if chosen == 1 and normalised:  # the one probability divided by itself: the router would never learn
        refuse("num_experts_per_tok", 1, ("at least 2 where the chosen probabilities are normalised",))
    return {
        "num_experts": count,
        "experts_per_token": chosen,
        "moe_ffn_hidden_size": positive_int(config, width),
        "norm_topk_prob": normalised,
    }
