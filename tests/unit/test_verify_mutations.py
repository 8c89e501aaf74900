"""Break one thing at a time: `verify` fails, and at the rung that can see it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megafuse.cli.convert import COMMANDS
from megafuse.converters import hf_config, maps
from megafuse.converters.importer import import_hf
from megafuse.converters.ladder import RUNGS, Finding, default_layouts, verify_ladder
from megafuse.converters.plan import Plan
from megafuse.converters.table import Arch, Hf, Row
from megafuse.errors import ConfigError, MegafuseError
from megafuse.model.arch import ModelArch
from megafuse.testing.families import WINDOW, WRITERS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    root = tmp_path_factory.mktemp("mutations")
    for family in ("llama", "qwen2", "mistral", "mixtral", "gemma2"):
        tied = family in ("gemma2", "qwen2")
        WRITERS[family](root / family / "hf", seed=seed, layers=2, tied=tied)
        import_hf(root / family / "hf", root / family / "ckpt")
    return {folder.name: folder for folder in root.iterdir()}


def verdict(folder: Path, ckpt: Path | None = None, **settings: Any) -> str | None:
    """The rung at which it fails."""
    settings = {"layouts": ["dp"], "tokens": 90, **settings}
    found = verify_ladder(ckpt or folder / "ckpt", folder / "hf", **settings)
    failed = [finding.rung for finding in found if not finding.ok]
    assert len(set(failed)) <= 1 and [f.rung for f in found] == [r for r in RUNGS if r in {f.rung for f in found}]
    return failed[0] if failed else None


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_what_is_right_passes(folders: dict[str, Path], family: str) -> None:
    assert verdict(folders[family]) is None


def scaled(arch: ModelArch, **factors: float) -> ModelArch:
    assert arch.rope_scaling is not None
    changed = {name: type(value)(value * factors.get(name, 1)) for name, value in vars(arch.rope_scaling).items()}
    return replace(arch, rope_scaling=replace(arch.rope_scaling, **changed))


MODELS: dict[str, tuple[str, Callable[[ModelArch], ModelArch]]] = {
    "eps": ("gemma2", lambda a: replace(a, rms_norm_eps=1e-5)),
    "window layers": ("gemma2", lambda a: replace(a, window_layers=(1,))),
    "window + 1": ("gemma2", lambda a: replace(a, window=WINDOW + 1)),
    "window - 1": ("mistral", lambda a: replace(a, window=WINDOW - 1)),
    "no window": ("mixtral", lambda a: replace(a, window=None, window_layers=())),
    "attention softcap": ("gemma2", lambda a: replace(a, attention_softcap=1.01)),
    "no attention softcap": ("gemma2", lambda a: replace(a, attention_softcap=None)),
    "final softcap": ("gemma2", lambda a: replace(a, final_softcap=1.501)),
    "no final softcap": ("gemma2", lambda a: replace(a, final_softcap=None)),
    "embedding scale": ("gemma2", lambda a: replace(a, embedding_scale=None)),
    "attention scale": ("gemma2", lambda a: replace(a, attention_scale=None)),
    "activation": ("gemma2", lambda a: replace(a, activation="silu")),
    "centre of the norms": ("gemma2", lambda a: replace(a, zero_centred_norms=False)),
    "no rope scaling": ("llama", lambda a: replace(a, rope_scaling=None)),
    "rope factor": ("llama", lambda a: scaled(a, factor=1.1)),
    "rope low": ("llama", lambda a: scaled(a, low_freq_factor=1.1)),
    "rope high": ("llama", lambda a: scaled(a, high_freq_factor=1.1)),
    "rope original": ("llama", lambda a: scaled(a, original_max_position_embeddings=1.1)),
    "rope theta": ("llama", lambda a: replace(a, rope_theta=a.rope_theta * 1.01)),
    "experts per token": ("mixtral", lambda a: replace(a, experts_per_token=3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_read_wrong_fails_at_the_logits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The same error on both sides: weights, loads and saves agree, only transformers knows better."""
    family, change = MODELS[name]
    right = hf_config.parse_hf_config
    monkeypatch.setattr(hf_config, "parse_hf_config", lambda config: change(right(config)))
    assert verdict(folders[family]) == "logits"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_tie_that_is_read_wrong_fails_at_the_plan(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    right = hf_config.parse_hf_config
    flip = lambda a: replace(a, tie_word_embeddings=not a.tie_word_embeddings)  # noqa: E731
    monkeypatch.setattr(hf_config, "parse_hf_config", lambda config: flip(right(config)))
    assert verdict(folders[family]) == "plan"


def swapped(one: str, two: str) -> Callable[[Row], Row]:
    def swap(row: Row) -> Row:
        names = [hf.name for hf in row.hf]
        if not any(one in name for name in names) or not any(two in name for name in names):
            return row
        other = [name.replace(one, "?").replace(two, one).replace("?", two) for name in names]
        return replace(row, hf=tuple(Hf(name, hf.dims) for name, hf in zip(other, row.hf)))

    return swap


def ungrouped(row: Row) -> Row:
    return replace(row, pack="concat") if row.pack == "grouped" else row


TABLES: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "QKV order": ("qwen2", swapped("k_proj", "v_proj")),
    "QKV not by groups": ("gemma2", ungrouped),
    "gate and up": ("gemma2", swapped("gate_proj", "up_proj")),
    "gate and up of experts": ("mixtral", swapped("w1", "w3")),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_wrong(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Written and read with the same wrong table, only the logits tell; read with the right one, the bits do."""
    family, change = TABLES[name]
    right: Arch = maps.find(class_name(folders[family]))
    wrong = replace(right, rows=tuple(change(row) for row in right.rows))
    assert wrong != right
    monkeypatch.setitem(maps._TABLES, right.name, wrong)
    import_hf(folders[family] / "hf", tmp_path / "ckpt")
    assert verdict(folders[family], tmp_path / "ckpt") == "logits"
    monkeypatch.undo()
    assert verdict(folders[family], tmp_path / "ckpt") == "bits"


def class_name(folder: Path) -> str:
    return str(json.loads((folder / "hf" / "config.json").read_text())["architectures"][0])


def test_experts_in_another_order(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add = Plan._add

    def reversed_experts(self: Plan, row: Row, layer: int | None, expert: int | None) -> None:
        if expert is not None:
            last = (self.model.num_experts or 0) - 1
            row = replace(row, hf=tuple(Hf(hf.name.replace("{e}", str(last - expert)), hf.dims) for hf in row.hf))
        add(self, row, layer, expert)

    monkeypatch.setattr(Plan, "_add", reversed_experts)
    import_hf(folders["mixtral"] / "hf", tmp_path / "ckpt")
    assert verdict(folders["mixtral"], tmp_path / "ckpt") == "logits"
    monkeypatch.undo()
    assert verdict(folders["mixtral"], tmp_path / "ckpt") == "bits"


def test_other_folders_fail_at_the_first_rungs(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    gemma = folders["gemma2"]
    shutil.copytree(gemma / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    found: list[Finding] = verify_ladder(tmp_path / "hf", gemma / "ckpt")
    assert [(f.rung, f.ok) for f in found] == [("plan", False)] and "window 8 and 9" in found[0].detail
    command, run = COMMANDS["verify"]
    assert run(command(src=tmp_path / "hf", dst=gemma / "ckpt")) == 3
    assert "fails at rung 'plan'" in capsys.readouterr().out
    shutil.copytree(gemma / "ckpt", tmp_path / "ckpt")
    with (tmp_path / "ckpt" / "__0_0.distcp").open("r+b") as file:
        file.seek(-5000, 2)
        byte = file.read(1)
        file.seek(-5000, 2)
        file.write(bytes([byte[0] ^ 1]))
    assert verdict(gemma, tmp_path / "ckpt") == "bits"


class Poison:
    """A pickle that would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "poisoned common.pt", "poisoned .metadata"])
@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no-manifest"])
def test_damaged_checkpoints_end_with_a_verdict(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, manifest: bool
) -> None:
    hf, ckpt = folders["llama"] / "hf", tmp_path / "ckpt"
    shutil.copytree(folders["llama"] / "ckpt", ckpt)
    data, mark = ckpt / "__0_0.distcp", tmp_path / "ran"
    if damage == "truncated":
        os.truncate(data, 1000)
    elif damage == "bit flipped":
        raw = bytearray(data.read_bytes())
        raw[-5000] ^= 1
        data.write_bytes(raw)
    else:
        (ckpt / damage.split()[1]).write_bytes(pickle.dumps(Poison(mark)))
    if not manifest:
        (ckpt / "manifest.json").unlink()
    command, run = COMMANDS["verify"]
    try:
        assert run(command(src=ckpt, dst=hf, layouts=("dp",))) == 3
        said = capsys.readouterr().out
        assert "verdict: NOT the same model" in said and said.count("FAIL") == 1 and "Traceback" not in said
    except MegafuseError as error:  # what no rung can begin with
        assert damage == "poisoned .metadata" and ".metadata" in str(error)
    assert not mark.exists(), "nothing that the checkpoint brings is run"


def test_what_megatron_loads_or_saves_wrong_fails_there(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from megafuse.checkpoint import state
    from megafuse.converters import rungs

    load, cast = state.load_model, rungs._cast

    def loads_two_layers_alike(model: Any, *args: Any) -> None:
        load(model, *args)
        layers = model[0].decoder.layers
        with torch.no_grad():
            layers[1].mlp.linear_fc2.weight.copy_(layers[0].mlp.linear_fc2.weight)

    def saves_one_bit_else(tensors: Any, dtypes: Any) -> None:
        cast(tensors, dtypes)
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        value = next(v for v in nested_values(tensors) if "linear_fc2" in getattr(v, "key", ""))
        value.data = value.data.clone()
        value.data.view(torch.uint8).view(-1)[0] ^= 1

    monkeypatch.setattr(state, "load_model", loads_two_layers_alike)
    assert verdict(folders["llama"]) == "load"
    monkeypatch.setattr(state, "load_model", load)
    monkeypatch.setattr(rungs, "_cast", saves_one_bit_else)
    assert verdict(folders["llama"]) == "save"


def test_a_rung_that_fails_is_the_last_one_begun(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megafuse.converters import ladder

    shutil.copytree(folders["gemma2"] / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    for name in ("verify", "huggingface_logits", "_at_world"):
        monkeypatch.setattr(ladder, name, lambda *args, **more: pytest.fail("hours of work for nothing"))
    assert verdict(tmp_path, folders["gemma2"] / "ckpt") == "plan"


def test_what_cannot_be_verified_is_refused(folders: dict[str, Path]) -> None:
    llama = folders["llama"]
    for one, other, named in ((llama / "hf", llama / "hf", "both"), (llama / "ckpt", llama / "no", "not a folder")):
        with pytest.raises(ConfigError, match=named):
            verify_ladder(one, other)
    with pytest.raises(ConfigError, match="upto"):
        verify_ladder(llama / "hf", llama / "ckpt", upto="top")
    with pytest.raises(ConfigError, match="layout 'tp4' does not fit"):
        verify_ladder(llama / "hf", llama / "ckpt", layouts=["tp4"])


def test_default_layouts_are_those_that_divide(folders: dict[str, Path]) -> None:
    from megafuse.model.arch import read_arch

    assert default_layouts(read_arch(folders["mixtral"])) == ["dp", "tp2-sp", "pp2", "tp2-sp-pp2", "ep2"]
    llama = read_arch(folders["llama"])
    assert default_layouts(replace(llama, num_heads=9, num_kv_heads=3, num_layers=30, ffn_hidden_size=96)) == [
        "dp", "tp3", "pp2", "tp3-pp2",
    ]  # fmt: skip
    assert default_layouts(replace(llama, num_kv_heads=1)) == ["dp", "pp2"]
