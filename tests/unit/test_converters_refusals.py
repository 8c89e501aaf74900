"""Folders that a conversion must not touch, and folders whose meaning is unclear."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megafuse.converters.exporter import export_hf
from megafuse.converters.folders import new_folder
from megafuse.converters.importer import dry_run, import_hf
from megafuse.converters.safetensors_io import weight_files
from megafuse.errors import ConfigError
from megafuse.testing.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "hf", seed=1, layers=1)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    import_hf(model, tmp_path_factory.mktemp("imported") / "ckpt")
    return next(tmp_path_factory.getbasetemp().glob("imported*/ckpt"))


def test_only_a_model_is_overwritten(tmp_path: Path, model: Path, imported: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "config.json").write_text('{"my": "app"}')
    (app / "data").write_text("mine")
    with pytest.raises(ConfigError, match="no model folder"):
        export_hf(imported, app, overwrite=True)
    export_hf(imported, tmp_path / "hf")
    (tmp_path / "hf" / "notes").mkdir()
    with pytest.raises(ConfigError, match="no conversion has made the folder notes"):
        export_hf(imported, tmp_path / "hf", overwrite=True)
    assert (app / "data").read_text() == "mine" and (tmp_path / "hf" / "notes").is_dir()


def test_outputs_that_cannot_be_are_refused_by_a_dry_run_too(tmp_path: Path, model: Path, imported: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    outs = {"file": "not a folder", "file/x": "is a file", "full": "exists"}
    for out, named in outs.items():
        for convert in (dry_run, import_hf):
            with pytest.raises(ConfigError, match=named):
                convert(model, tmp_path / out)
    with pytest.raises(ConfigError, match="cannot be made"), new_folder("/proc/x/y", overwrite=False, inputs=()):
        pytest.fail("nobody can write there")
    with pytest.raises(ConfigError, match=r"like: .* is not a folder"):
        export_hf(imported, tmp_path / "out", like=tmp_path / "file")
    with pytest.raises(ConfigError, match="max_shard_gb = inf"):
        export_hf(imported, tmp_path / "out", max_shard_gb=float("inf"))


def test_unclear_folders_are_refused(tmp_path: Path, model: Path) -> None:
    def changed(name: str, change: Callable[[Path], object]) -> Path:
        hf = Path(shutil.copytree(model, tmp_path / name))
        change(hf)
        return hf

    def stale(hf: Path) -> None:
        """transformers would load the single file of an earlier save, the index names others."""
        shutil.copy(hf / weight_files(hf)[0], hf / "other.safetensors")
        names = [name for file in weight_files(hf) for name in load_file(hf / file)]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "other.safetensors")}
        (hf / "model.safetensors.index.json").write_text(json.dumps(index))
        (hf / "model.safetensors").touch()

    def twice(hf: Path) -> None:
        text = (hf / "config.json").read_text().rstrip()
        (hf / "config.json").write_text(text[:-1] + ', "rms_norm_eps": 1e-3}')

    def folder(name: str) -> Callable[[Path], object]:
        def change(hf: Path) -> None:
            (hf / name).unlink(missing_ok=True)
            (hf / name).mkdir()

        return change

    cases = {
        "stale": (stale, "delete the one that is not meant"),
        "twice": (twice, "'rms_norm_eps' is repeated"),
        "config": (folder("config.json"), "cannot be read"),
        "link": (lambda hf: (hf / "extra.json").symlink_to("nowhere"), "a link to nowhere"),
        "weights": (folder(weight_files(model)[0]), "is no file"),
    }
    for name, (change, named) in cases.items():
        with pytest.raises(ConfigError, match=named):
            import_hf(changed(name, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()
