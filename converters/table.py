"""Which Hugging Face tensors make up which megatron-core tensor: one declarative row each.

Every mcore tensor is a concatenation, along its rows, of row ranges of HF tensors. A row of the table says which and in
what order; import, export, every tensor-parallel slice and the check that nothing is lost are all derived from it. An
architecture is a list of rows, one file a family in `converters/maps`; what several share stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megafuse.model.arch import ModelArch

Pack = Literal["concat", "grouped"]


@dataclass(frozen=True)
class Hf:
    """An HF tensor: its name (`{i}` the layer, `{e}` the expert) and its shape, a letter a dimension (`dimensions`)."""

    name: str
    dims: str


@dataclass(frozen=True)
class Row:
    """One mcore tensor.

    Attributes:
        mcore: canonical checkpoint name; `{i}` is the layer, `{e}` the expert. mcore stores every layer spec under
            Transformer Engine's names, where a norm belongs to the linear layer behind it.
        hf: the HF tensors that it is made of.
        pack: `concat` puts whole tensors one after the other; tensor parallelism cuts each of them. `grouped` takes,
            for each KV group in turn, that group's rows of each tensor; tensor parallelism cuts the packed rows.
        tp: the dimension that tensor parallelism cuts, or None where every rank holds all of it.
        stage: the pipeline stage: `first`, `last`, or the one that holds the layer.
        untied_only: the row does not exist where the output layer is the embedding.
    """

    mcore: str
    hf: tuple[Hf, ...]
    pack: Pack = "concat"
    tp: Literal[0, 1] | None = None
    stage: Literal["first", "layer", "last"] = "layer"
    untied_only: bool = False

    @property
    def experts(self) -> bool:
        """There is one for every expert of the layer."""
        return "{e}" in self.mcore

    @property
    def vocabulary(self) -> bool:
        """Its rows are tokens: training may have padded them, files that megafuse writes never are."""
        return self.hf[0].dims[0] == "V"


@dataclass(frozen=True)
class Arch:
    """An architecture: its HF class name, its rows, and the modules that mcore expects an `_extra_state` of.

    Attributes:
        tied_output: (HF name of the output layer, HF name of the embedding that it equals where they are tied).
        derived: suffixes of HF tensors that follow from the configuration (old buffers): carried along, never loaded.
    """

    name: str
    rows: tuple[Row, ...]
    extra_states: tuple[str, ...]
    tied_output: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    derived: tuple[str, ...] = (".rotary_emb.inv_freq",)


_H, _M = "model.layers.{i}.", "decoder.layers.{i}."
INPUT_NORM = Row(_M + "self_attention.linear_qkv.layer_norm_weight", (Hf(_H + "input_layernorm.weight", "H"),))
QKV = Row(
    _M + "self_attention.linear_qkv.weight",
    (
        Hf(_H + "self_attn.q_proj.weight", "QH"),
        Hf(_H + "self_attn.k_proj.weight", "KH"),
        Hf(_H + "self_attn.v_proj.weight", "KH"),
    ),
    pack="grouped",
    tp=0,
)
QKV_BIAS = Row(
    _M + "self_attention.linear_qkv.bias",
    tuple(Hf(_H + f"self_attn.{x}_proj.bias", rows) for x, rows in (("q", "Q"), ("k", "K"), ("v", "K"))),
    pack="grouped",
    tp=0,
)
QK_NORM = tuple(
    Row(_M + f"self_attention.{x}_layernorm.weight", (Hf(_H + f"self_attn.{x}_norm.weight", "D"),)) for x in "qk"
)
PROJECTION = Row(_M + "self_attention.linear_proj.weight", (Hf(_H + "self_attn.o_proj.weight", "HQ"),), tp=1)
ATTENTION = (INPUT_NORM, QKV, PROJECTION)
MLP = (
    Row(
        _M + "mlp.linear_fc1.weight",
        (Hf(_H + "mlp.gate_proj.weight", "FH"), Hf(_H + "mlp.up_proj.weight", "FH")),
        tp=0,
    ),
    Row(_M + "mlp.linear_fc2.weight", (Hf(_H + "mlp.down_proj.weight", "HF"),), tp=1),
)
NORMED_MLP = (Row(_M + "mlp.linear_fc1.layer_norm_weight", (Hf(_H + "post_attention_layernorm.weight", "H"),)), *MLP)
EMBEDDING = Row("embedding.word_embeddings.weight", (Hf("model.embed_tokens.weight", "VH"),), tp=0, stage="first")
HEAD = (
    Row("decoder.final_layernorm.weight", (Hf("model.norm.weight", "H"),), stage="last"),
    Row("output_layer.weight", (Hf("lm_head.weight", "VH"),), tp=0, stage="last", untied_only=True),
)
ATTENTION_STATES = tuple(_M + f"self_attention.{module}." for module in ("core_attention", "linear_qkv", "linear_proj"))
QK_STATES = tuple(_M + f"self_attention.{x}_layernorm." for x in "qk")
MLP_STATES = (_M + "mlp.linear_fc1.", _M + "mlp.linear_fc2.")
_X = _M + "mlp.experts.experts.{e}."
EXPERT_STATES = (_M + "pre_mlp_layernorm.", _X + "linear_fc1.", _X + "linear_fc2.")
END_STATES = ("decoder.final_layernorm.", "output_layer.")


def sparse_mlp(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and its experts. `block` is what the HF layer calls them, the others what an expert calls its parts."""
    expert = _H + block + ".experts.{e}."
    return (
        Row(_M + "pre_mlp_layernorm.weight", (Hf(_H + "post_attention_layernorm.weight", "H"),)),
        Row(_M + "mlp.router.weight", (Hf(_H + block + ".gate.weight", "EH"),)),
        Row(_X + "linear_fc1.weight", (Hf(f"{expert}{gate}.weight", "XH"), Hf(f"{expert}{up}.weight", "XH")), tp=0),
        Row(_X + "linear_fc2.weight", (Hf(f"{expert}{down}.weight", "HX"),), tp=1),
    )


def dimensions(arch: ModelArch) -> Mapping[str, int]:
    """What the letters of `Hf.dims` stand for.

    V tokens, H hidden, F MLP width, Q query rows, K key (or value) rows, D one head, E experts, X an expert's MLP width
    (E and X are 0 for a dense model, whose table does not use them).
    """
    return {
        "V": arch.vocab_size,
        "H": arch.hidden_size,
        "F": arch.ffn_hidden_size,
        "Q": arch.num_heads * arch.head_dim,
        "K": arch.num_kv_heads * arch.head_dim,
        "D": arch.head_dim,
        "E": arch.num_experts or 0,
        "X": arch.moe_ffn_hidden_size or 0,
    }
