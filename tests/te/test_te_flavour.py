"""A real Transformer Engine's modules, built without a GPU: names, shapes, sharded state, and one checkpoint for both.

That they compute the same is checked on a GPU: tests/gpu/test_cuda_te.py.
"""

import filecmp
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.testing.distributed import run_distributed
from megafuse.testing.families import WRITERS
from megafuse.testing.te_on_cpu import Flavours, look_at_flavours

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None,
        reason="Transformer Engine is not installed; `make te-check` builds it, without a GPU",
    ),
]
FAMILIES = sorted(WRITERS)
SPARSE = ("mixtral", "qwen3_moe")
LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB = 4, 48, 6, 2, 121  # odd, so that tensor parallelism pads it
WORLD = 2


def layouts(family: str) -> list[str]:
    """What two ranks can be."""
    own = {"gemma2": ["pp2-vpp2"], "mixtral": ["ep2"], "qwen3_moe": ["ep2", "tp2-sp-ep2"]}
    return ["dp", "tp2-sp" if family in SPARSE else "tp2", "pp2", *own.get(family, [])]


@dataclass(frozen=True)
class Bench:
    """FAMILY/hf, FAMILY/ckpt and FAMILY/saved under `root`; what was found by family and layout, one a rank."""

    root: Path
    found: dict[tuple[str, str], list[Flavours]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    bench, asked = Bench(tmp_path_factory.mktemp("te"), {}), []
    for family in FAMILIES:
        folder = bench.root / family
        WRITERS[family](folder / "hf", seed=seed, vocab=VOCAB)
        import_hf(folder / "hf", folder / "ckpt")
        *first, last = layouts(family)
        asked += [(folder / "ckpt", folder / "hf", first, None)]
        asked += [(folder / "ckpt", folder / "hf", [last], folder / "saved")]
    ranks = run_distributed(look_at_flavours, WORLD, asked, timeout=1400)
    for place, (ckpt, *_) in enumerate(asked):
        for facts in zip(*(rank[place] for rank in ranks), strict=True):
            bench.found[ckpt.parent.name, facts[0].layout] = list(facts)
    return bench


def expected(family: str) -> dict[str, tuple[int, ...]]:
    """Transformer Engine's names of a whole model: norms inside the linear layers behind them."""
    wide = 12 if family in ("gemma2", "qwen3", "qwen3_moe") else HIDDEN // HEADS
    tied = family in ("gemma2", "llama", "qwen2", "qwen3")
    names: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }
    if not tied:
        names["output_layer.weight"] = (VOCAB, HIDDEN)
    for layer in (f"decoder.layers.{i}." for i in range(LAYERS)):
        qkv = wide * (HEADS + 2 * KV_HEADS)
        names[layer + "self_attention.linear_qkv.layer_norm_weight"] = (HIDDEN,)
        names[layer + "self_attention.linear_qkv.weight"] = (qkv, HIDDEN)
        names[layer + "self_attention.linear_proj.weight"] = (HIDDEN, wide * HEADS)
        if family == "qwen2":
            names[layer + "self_attention.linear_qkv.bias"] = (qkv,)
        if family.startswith("qwen3"):
            names[layer + "self_attention.q_layernorm.weight"] = (wide,)
            names[layer + "self_attention.k_layernorm.weight"] = (wide,)
        if family == "gemma2":
            names[layer + "self_attention.linear_proj.post_layernorm.weight"] = (HIDDEN,)
            names[layer + "mlp.linear_fc2.post_layernorm.weight"] = (HIDDEN,)
        if family in SPARSE:
            experts, width = {"mixtral": (4, 2 * HIDDEN), "qwen3_moe": (8, 32)}[family]
            names[layer + "pre_mlp_layernorm.weight"] = (HIDDEN,)
            names[layer + "mlp.router.weight"] = (experts, HIDDEN)
            for e in range(experts):
                names[layer + f"mlp.experts.linear_fc1.weight{e}"] = (2 * width, HIDDEN)
                names[layer + f"mlp.experts.linear_fc2.weight{e}"] = (HIDDEN, width)
        else:
            names[layer + "mlp.linear_fc1.layer_norm_weight"] = (HIDDEN,)
            names[layer + "mlp.linear_fc1.weight"] = (4 * HIDDEN, HIDDEN)
            names[layer + "mlp.linear_fc2.weight"] = (HIDDEN, 2 * HIDDEN)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_transformer_engines(bench: Bench, family: str) -> None:
    for facts in bench.found[family, "dp"]:
        assert facts.names == expected(family)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in layouts(family)])
def test_both_flavours_load_one_checkpoint(bench: Bench, family: str, name: str) -> None:
    """Same keys, shapes, parts and dtypes; every parameter is the folder's, by the checkpoint and without it."""
    for facts in bench.found[family, name]:
        assert facts.apart == ()
        assert (facts.wrong, facts.direct) == ((), ()) and facts.compared >= len(facts.names)


@pytest.mark.parametrize("family", FAMILIES)
def test_extra_states_belong_to_every_module_of_transformer_engine(bench: Bench, family: str) -> None:
    first = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4"
    for facts in bench.found[family, "dp"]:
        assert first in facts.states and len(facts.states) >= 4 * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_this_flavour_saves_is_exported_to_the_byte(bench: Bench, family: str, tmp_path: Path) -> None:
    folder = bench.root / family
    shutil.copytree(folder / "ckpt" / "hf", folder / "saved" / "hf")
    export_hf(folder / "saved", tmp_path / "back")
    names = sorted(p.name for p in (folder / "hf").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "back").iterdir())
    assert filecmp.cmpfiles(folder / "hf", tmp_path / "back", names, shallow=False) == (names, [], [])
