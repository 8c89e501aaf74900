"""New shards on export: those of transformers' `save_pretrained`, file by file, with an index that is right."""

import filecmp
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafuse.cli.convert import COMMANDS
from megafuse.converters.digest import weights_digest
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.converters.safetensors_io import SafetensorsFolder
from megafuse.errors import ConfigError, IntegrityError
from megafuse.testing.families import WRITERS, publish

INDEX = "model.safetensors.index.json"
DENSE = sorted(set(WRITERS) - {"mixtral", "qwen3_moe"})


def write(folder: Path, family: str, *, tied: bool = False, shards: int = 3) -> Path:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    # 12 layers: in an order by letters 10 comes before 2
    WRITERS[family](folder, seed=seed, layers=12, hidden=32, heads=4, kv_heads=2, vocab=53, tied=tied)
    return publish(folder, shards=shards)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_the_files_are_those_of_transformers(tmp_path: Path, family: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    hf = write(tmp_path / "hf", family, tied=dtype == "keep")
    import_hf(hf, tmp_path / "ckpt")
    stored = torch.bfloat16 if dtype == "keep" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=stored)
    for limit in (3_000, 30_000, 10**9):
        model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
        report = export_hf(tmp_path / "ckpt", tmp_path / "ours", max_shard_gb=limit / 1e9, dtype=dtype, jobs=2)
        theirs, ours = (
            sorted(p.name for p in (tmp_path / who).iterdir() if p.name.startswith("model"))
            for who in ("theirs", "ours")
        )
        assert ours == theirs and (INDEX in ours) == (limit < 10**9)
        same = filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", ours, shallow=False)
        assert same == (ours, [], []), same
        assert weights_digest(tmp_path / "ours") == report.weights_sha256
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert config["dtype"] == str(stored).removeprefix("torch.")
        for folder in ("theirs", "ours"):
            shutil.rmtree(tmp_path / folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_new_files(tmp_path: Path, family: str) -> None:
    """transformers joins experts first, so its files differ; the index is the same but for the names of files."""
    hf = write(tmp_path / "hf", family)
    import_hf(hf, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_gb=40e-6)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    found = weights(hf)
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in found.values()),
        "total_size": sum(t.nbytes for t in found.values()),
    }
    for file in (tmp_path / "back").glob("*.safetensors"):
        held = load_file(file)
        assert {index["weight_map"].pop(name) for name in held} == {file.name}
        assert sum(t.nbytes for t in held.values()) <= 40_000
        assert all(torch.equal(found.pop(name), tensor) for name, tensor in held.items())
    assert not found and not index["weight_map"]
    assert weights_digest(tmp_path / "back") == weights_digest(hf)


def test_nobody_knows_the_files_of_the_source(tmp_path: Path) -> None:
    """No hf/layout.json, or no hf/ at all and a folder with a configuration but no weights."""
    hf = write(tmp_path / "hf", "qwen2", tied=True, shards=2)
    digest = weights_digest(hf)
    import_hf(hf, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "manifest.json").unlink()
    (tmp_path / "ckpt" / "hf" / "layout.json").unlink()
    export_hf(tmp_path / "ckpt", tmp_path / "one")
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert weights_digest(tmp_path / "one") == digest
    assert filecmp.cmp(hf / "config.json", tmp_path / "one" / "config.json", shallow=False)

    like = tmp_path / "like"
    shutil.copytree(tmp_path / "one", like, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(tmp_path / "ckpt" / "hf")
    with pytest.raises(ConfigError, match="like"):
        export_hf(tmp_path / "ckpt", tmp_path / "two")
    export_hf(tmp_path / "ckpt", tmp_path / "two", like=like, max_shard_gb=20e-6, dtype="float32")
    assert len(list((tmp_path / "two").glob("model-*-of-*.safetensors"))) > 3
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float32"
    wide, stored = weights(tmp_path / "two"), weights(hf)
    assert wide.keys() == stored.keys() and all(torch.equal(wide[n], t.float()) for n, t in stored.items())
    with SafetensorsFolder(tmp_path / "two"):  # the index agrees with the files
        pass


def test_what_is_beside_the_weights_is_kept(tmp_path: Path) -> None:
    """A stored twin of a tied embedding, old buffers, metadata; as many files as before, but other ones."""
    hf = write(tmp_path / "hf", "llama", tied=True, shards=1)
    stored = weights(hf) | {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    (hf / "model.safetensors").unlink()
    names, weight_map = sorted(stored), {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: stored[n] for n in names[i::2]}, hf / file, {"format": "pt", "note": "kept"})
        weight_map |= dict.fromkeys(names[i::2], file)
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    import_hf(hf, tmp_path / "ckpt")
    size = sum(t.nbytes for t in stored.values())
    export_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_gb=size * 0.6 / 1e9)
    with SafetensorsFolder(tmp_path / "back") as found:
        assert sorted(found.headers) == sorted(set(weight_map.values()))
        assert all(header.metadata == {"format": "pt", "note": "kept"} for header in found.headers.values())
    back = weights(tmp_path / "back")
    assert back.keys() == stored.keys() and all(torch.equal(back[n], t) for n, t in stored.items())
    assert json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"] != weight_map


def test_shards_that_cannot_be(tmp_path: Path) -> None:
    hf = write(tmp_path / "hf", "llama", shards=1)
    import_hf(hf, tmp_path / "ckpt")
    for size in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="max_shard_gb"):
            export_hf(tmp_path / "ckpt", tmp_path / "no", max_shard_gb=size)
    (tmp_path / "ckpt" / "hf" / "layout.json").unlink()
    with pytest.raises(IntegrityError, match=r"layout\.json has None bytes"):
        export_hf(tmp_path / "ckpt", tmp_path / "no")
    command, run = COMMANDS["export"]
    import_hf(hf, tmp_path / "ckpt", overwrite=True)
    assert run(command(ckpt=tmp_path / "ckpt", out=tmp_path / "back", max_shard_gb=1e-5)) == 0
    assert weights_digest(tmp_path / "back") == weights_digest(hf)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ckpt", "hf"]
