"""What lies beside a model's safetensors, or in their place: left out of conversions, and named with what to do."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.peft_utils import find_adapter_config_file

from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import dry_run, import_hf, keep_side_files
from megafuse.converters.inspect import inspect
from megafuse.converters.ladder import Finding, verify_ladder
from megafuse.errors import ConfigError, DataError, IntegrityError, MegafuseError, UnsupportedModelError
from megafuse.testing.families import write_tiny_qwen2
from megafuse.testing.tiny import write_tiny_llama
from megafuse.testing.tokenizer import make_tokenizer

SINGLE = "model.safetensors"
LEFT_OUT = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.safetensors.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "hf_quant_config.json",
    "model-q4.gguf",
    "model.fp16.safetensors.index.json",
    "optimizer.pt",
    "params.json",
    "pytorch_model.bin.index.json",
    "quant_config.json",
    "quantize_config.json",
    "rng_state.pth",
    "rust_model.ot",
    "scheduler.pt",
    "tf_model.h5",
    "tf_model.h5.index.json",
    "training_args.bin",
]
KEPT = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "trainer_state.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("model") / "hf", seed=1, layers=1)
    for name in KEPT:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    import_hf(model, ckpt := tmp_path_factory.mktemp("imported") / "ckpt")
    return ckpt


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_would_be_loaded_with_the_weights_is_left_out(tmp_path: Path, model: Path) -> None:
    crowded = copied(model, tmp_path / "crowded")
    for name in LEFT_OUT:
        (crowded / name).write_text("{}")
    assert find_adapter_config_file(str(crowded)) is not None
    report = import_hf(crowded, tmp_path / "ckpt")
    assert sorted(report.skipped) == sorted(LEFT_OUT) == sorted(dry_run(crowded, tmp_path / "other").skipped)
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    export_hf(tmp_path / "ckpt", tmp_path / "like", like=crowded)
    keep_side_files(crowded, tmp_path / "run")
    assert names(tmp_path / "back") == names(tmp_path / "like") == sorted([*KEPT, SINGLE]) == names(model)
    assert names(tmp_path / "run") == sorted([*KEPT, "layout.json"])
    assert find_adapter_config_file(str(tmp_path / "back")) is None


def test_an_adapter_that_an_earlier_version_has_imported_is_not_exported(
    tmp_path: Path, model: Path, imported: Path
) -> None:
    old = copied(imported, tmp_path / "old")
    (old / "hf" / "adapter_config.json").write_text("{}")
    report = export_hf(old, tmp_path / "back")
    assert report.skipped == ("adapter_config.json",) and names(tmp_path / "back") == names(model)


OTHERS = {
    "pytorch_model.bin": "pickled weights",
    "pytorch_model-00001-of-00002.bin": "pickled weights",
    "consolidated.00.pth": "authors' own names",
    "consolidated.safetensors": "authors' own names",
    "model.Q4_K_M.gguf": "GGUF",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "adapter_config.json": "an adapter",
    "adapter_model.safetensors": "an adapter",
    "nothing.txt": "fetch all files of the model",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_another_format_says_what_to_do(tmp_path: Path, model: Path, other: str, config: bool) -> None:
    folder = copied(model, tmp_path / "a folder")
    (folder / SINGLE).unlink()
    if not config:
        (folder / "config.json").unlink()
    (folder / other).write_bytes(b"x")
    known = other != "nothing.txt"
    for use in (inspect, lambda hf: dry_run(hf, tmp_path / "out"), lambda hf: import_hf(hf, tmp_path / "out")):
        with pytest.raises(ConfigError) as caught:
            use(folder)
        message = str(caught.value)
        assert OTHERS[other] in message if known or config else "config.json does not exist" in message
        assert other in message or not known
        assert "fix: " in message and str(folder) in message
    assert names(tmp_path) == ["a folder"]


def test_the_command_for_pickled_weights_makes_a_folder_that_is_imported(tmp_path: Path, model: Path) -> None:
    folder = copied(model, tmp_path / "it's $HOME")
    torch.save(weights := load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    make_tokenizer(folder, 120)
    with pytest.raises(ConfigError) as caught:
        import_hf(folder, tmp_path / "ckpt")
    command = str(caught.value).partition("fix: ")[2]
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin / "python").chmod(stat.S_IRWXU)
    subprocess.run(command, shell=True, check=True, env=os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"})
    made = Path(f"{folder}-safetensors")
    import_hf(made, tmp_path / "ckpt")
    stored = load_file(made / SINGLE)
    assert stored.keys() == weights.keys() and all(torch.equal(stored[name], weights[name]) for name in weights)
    assert (made / "tokenizer.json").is_file()


def edited(change: dict[str, object]) -> Callable[[Path], object]:
    def edit(hf: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(config | change))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(hf: Path) -> None:
        stored = load_file(hf / SINGLE)
        change(stored)
        save_file(stored, hf / SINGLE)

    return edit


def truncated(hf: Path) -> None:
    with (hf / SINGLE).open("r+b") as file:
        file.truncate(5000)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], type[MegafuseError], str]] = {
    "key": (edited({"logit_scale": 2}), UnsupportedModelError, "logit_scale"),
    "value": (edited({"mlp_bias": True}), UnsupportedModelError, "mlp_bias"),
    "missing": (tensors(lambda t: t.pop(NORM)), IntegrityError, "1 tensors are missing"),
    "extra": (tensors(lambda t: t.update(more=torch.ones(2))), UnsupportedModelError, "would be lost: more"),
    "shape": (tensors(lambda t: t.update({NORM: torch.ones(7)})), IntegrityError, r"has shape \[7\]"),
    "dtype": (tensors(lambda t: t.update({NORM: torch.ones(48).long()})), UnsupportedModelError, "I64"),
    "another head": (
        tensors(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        DataError,
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "truncated": (truncated, IntegrityError, "fetch it again"),
    "no weights": (lambda hf: (hf / SINGLE).unlink(), ConfigError, "holds no weights"),
    "no config": (lambda hf: (hf / "config.json").unlink(), ConfigError, "does not exist"),
    "reserved": (lambda hf: (hf / "layout.json").touch(), DataError, "reserved for checkpoints"),
    "dangling": (lambda hf: (hf / "extra.json").symlink_to("nowhere"), ConfigError, "a link to nowhere"),
    "a checkpoint": (lambda hf: (hf / ".metadata").touch(), ConfigError, "is a checkpoint"),
    "no folder": (shutil.rmtree, ConfigError, "is not a folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_dry_run_refuses_what_an_import_refuses(tmp_path: Path, model: Path, name: str) -> None:
    change, kind, named = BROKEN[name]
    hf = copied(model, tmp_path / "hf")
    change(hf)
    said = []
    for convert in (dry_run, import_hf):
        with pytest.raises(kind, match=named) as caught:
            convert(hf, tmp_path / "out")
        said.append(str(caught.value))
    assert said[0] == said[1] and not (tmp_path / "out").exists()


def test_it_refuses_the_same_outputs_and_numbers(tmp_path: Path, model: Path) -> None:
    hf = copied(model, tmp_path / "hf")
    (tmp_path / "file").touch()
    for out, settings, named in (
        (hf, {}, "overlaps"),
        (hf / "inside", {}, "overlaps"),
        (tmp_path, {"overwrite": True}, "overlaps"),
        (tmp_path / "file", {"overwrite": True}, "not a folder"),
        (tmp_path / "file" / "x", {}, "is a file"),
        (model.parent, {}, "overlaps|exists"),
        (tmp_path / "out", {"jobs": 0}, "jobs = 0"),
        (tmp_path / "out", {"block_mb": 0}, "block_mb = 0"),
    ):
        for convert in (dry_run, import_hf):
            with pytest.raises(ConfigError, match=named):
                convert(hf, out, **settings)


def test_layouts_are_refused_before_anything_is_read(tmp_path: Path, imported: Path, model: Path) -> None:
    seen: list[Finding] = []
    for upto in ("plan", "logits"):
        with pytest.raises(ConfigError, match="'tq2' is not understood"):
            verify_ladder(tmp_path / "a", tmp_path / "b", layouts=["dp", "tq2"], upto=upto, show=seen.append)
    assert not seen
    with pytest.raises(ConfigError, match=re.escape("layout 'tp5' does not fit")):
        verify_ladder(imported, model, layouts=["tp5"], show=seen.append)
    assert [finding.rung for finding in seen] == ["plan"]


def test_a_tied_model_with_its_head_is_the_same_to_both(tmp_path: Path) -> None:
    hf = write_tiny_qwen2(tmp_path / "hf", seed=2, layers=1, tied=True)
    tensors(lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))(hf)
    assert dry_run(hf, tmp_path / "out").bytes == import_hf(hf, tmp_path / "out").bytes
