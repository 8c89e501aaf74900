"""Weights and configuration of one model, and another that is to take them: compared whole, never cut to fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megafuse.checkpoint.state import load_model
from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.converters.digest import weights_digest
from megafuse.converters.direct import load_hf_into
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.errors import DataError, IntegrityError
from megafuse.model.arch import ModelArch, read_arch
from megafuse.model.build import build_model, choose_backend
from megafuse.parallel.topology import layout, process_groups
from megafuse.testing.tiny import write_tiny_llama, write_tiny_qwen3, write_tiny_qwen3_moe

LLAMA: dict[str, dict[str, Any]] = {
    "policy": {},
    "wide": {"hidden": 96},
    "narrow": {"hidden": 24},
    "deep": {"layers": 3},
    "shallow": {"layers": 1},
    "grouped": {"kv_heads": 3},
    "large_vocabulary": {"vocab": 128},
    "small_vocabulary": {"vocab": 119},
    "untied": {"tied": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two_models")
    for name, settings in LLAMA.items():
        write_tiny_llama(root / name, **{"seed": 1, "layers": 2, **settings})
    write_tiny_qwen3(root / "qk_norm", seed=1, layers=2, head_dim=8)
    for name, experts in {"moe": 8, "more_experts": 16}.items():
        write_tiny_qwen3_moe(root / name, seed=1, layers=2, experts=experts)
    return root


def fill(arch: ModelArch, path: Path, by: Any = None) -> None:
    """Load the folder into a model of `arch`, as `load_model` or (a Hugging Face folder) `load_hf_into` does."""
    parallel = ParallelConfig()
    settings = ModelConfig(path=path, precision="fp32")
    backend = choose_backend(settings, parallel, head_dim=arch.head_dim, prefix_sharing=True)
    with process_groups(), layout(parallel) as topology:
        model = build_model(arch, parallel, topology, backend)
        (by or (load_model if (path / ".metadata").is_file() else load_hf_into))(model, topology, path)


@pytest.mark.parametrize("imported", [False, True], ids=["hf", "torch_dist"])
def test_every_model_takes_its_own_and_no_other(folders: Path, tmp_path: Path, imported: bool) -> None:
    pairs = [("policy", name) for name in (*LLAMA, "qk_norm")]
    pairs += [(name, "policy") for name in (*LLAMA, "qk_norm") if name != "policy"]
    pairs += [("moe", "moe"), ("moe", "more_experts"), ("more_experts", "moe"), ("moe", "policy")]
    for taker, given in pairs:
        path = folders / given
        if imported:
            path = tmp_path / given
            if not path.is_dir():
                import_hf(folders / given, path)
        arch = read_arch(folders / taker)
        if taker == given:
            fill(arch, path)
            continue
        with pytest.raises(IntegrityError) as caught:
            fill(arch, path)
        told = str(caught.value)
        assert "is another model: " in told or "the table of" in told, (taker, given, told)


def test_the_message_names_the_tensor_and_both_shapes(folders: Path) -> None:
    wanted = r"wide is another model: its embedding\.word_embeddings\.weight is \[120, 96\], that .* is \[120, 48\]"
    with pytest.raises(IntegrityError, match=wanted):
        fill(read_arch(folders / "policy"), folders / "wide")
    with pytest.raises(IntegrityError, match=r"untied is another model: it has output_layer\.weight, which the"):
        fill(read_arch(folders / "policy"), folders / "untied")


def test_an_output_layer_that_its_configuration_ties_away_is_not_lost(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "untied", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(DataError, match=r"tie_word_embeddings = true, but lm_head\.weight differs"):
        fill(read_arch(tmp_path / "model"), tmp_path / "model", by=load_model)


@pytest.mark.parametrize("change", [{"vocab_size": 100}, {"rms_norm_eps": 1e-6}, {"num_hidden_layers": 1}], ids=str)
def test_a_checkpoint_whose_configuration_was_exchanged(folders: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """One of fewer tokens looks as if training had padded the vocabulary, and another epsilon fits all weights."""
    import_hf(folders / "policy", tmp_path / "model")
    path = tmp_path / "model" / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for take in (
        lambda: fill(read_arch(tmp_path / "model"), tmp_path / "model"),
        lambda: export_hf(tmp_path / "model", tmp_path / "out"),
        lambda: weights_digest(tmp_path / "model"),
    ):
        with pytest.raises(IntegrityError, match=r"hf/config\.json (has|is not the one that)"):
            take()
    assert not (tmp_path / "out").exists()
