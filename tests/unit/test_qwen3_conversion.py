"""Qwen3 and Qwen3-MoE there and back, what lies in the checkpoint, and every rank's experts."""

import filecmp
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megafuse.converters.digest import weights_digest
from megafuse.converters.exporter import export_hf
from megafuse.converters.folders import open_weights
from megafuse.converters.importer import import_hf
from megafuse.converters.inspect import inspect
from megafuse.converters.layouts import rank_state_dict
from megafuse.converters.verify import verify
from megafuse.errors import ConfigError, IntegrityError, UnsupportedModelError
from megafuse.testing.tiny import write_tiny_qwen3, write_tiny_qwen3_moe

LAYERS, EXPERTS, WIDTH, HIDDEN = 3, 6, 10, 36
SHAPE = {"layers": LAYERS, "hidden": HIDDEN, "heads": 9, "kv_heads": 3, "head_dim": 8, "vocab": 53}


def write(folder: Path, family: str, *, tied: bool, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Path:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    if family == "moe":
        write_tiny_qwen3_moe(folder, seed=seed, tied=tied, experts=EXPERTS, expert_width=WIDTH, **SHAPE)
    else:
        write_tiny_qwen3(folder, seed=seed, tied=tied, **SHAPE)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights, key=lambda name: name[::-1])
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_folder(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("moe") / "hf", "moe", tied=False, shards=3)


@pytest.fixture(scope="module")
def imported(moe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "ckpt"
    import_hf(moe, out)
    return out


@pytest.mark.parametrize("family", ["dense", "moe"])
@pytest.mark.parametrize(("tied", "shards", "dtype"), [(True, 1, torch.bfloat16), (False, 5, torch.float32)])
def test_there_and_back_is_the_same_to_the_byte(tmp_path, family, tied, shards, dtype):
    hf = write(tmp_path / "hf", family, tied=tied, shards=shards, dtype=dtype)
    report = import_hf(hf, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(hf, tmp_path / "back")
    assert report.weights_sha256 == weights_digest(hf) == weights_digest(tmp_path / "ckpt")
    assert report.parameters == sum(t.numel() for t in read_weights(hf).values())
    assert verify(tmp_path / "ckpt", hf).tensors == len(read_weights(hf))


def test_verify_sees_one_bit_of_one_expert(tmp_path, moe, imported):
    other = Path(shutil.copytree(moe, tmp_path / "other"))
    name = f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj.weight"
    (file,) = [f for f in other.glob("*.safetensors") if name in load_file(f)]
    weights = load_file(file)
    weights[name].view(torch.int16)[-1, -1] ^= 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"1 of \d+ tensors differ: {name}"):
        verify(imported, other)


def packed(hf: dict[str, torch.Tensor], layer: int, expert: int, linear: str) -> torch.Tensor:
    """[gate; up] or down of one expert, from whole HF tensors."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    names = ("gate_proj", "up_proj") if linear == "linear_fc1" else ("down_proj",)
    return torch.cat([hf[f"{prefix}{name}.weight"] for name in names])


def test_torch_reads_what_mcore_means(moe, imported):
    """The stacked tensors that mcore's sharded_state_dict asks for, through torch's own reader."""
    hf, layers = read_weights(moe), range(LAYERS)
    stack = lambda name: torch.stack([hf[f"model.layers.{i}.{name}.weight"] for i in layers])  # noqa: E731
    want = {
        "self_attention.q_layernorm.weight": stack("self_attn.q_norm"),
        "self_attention.k_layernorm.weight": stack("self_attn.k_norm"),
        "pre_mlp_layernorm.weight": stack("post_attention_layernorm"),
        "mlp.router.weight": stack("mlp.gate"),
    }
    for name in ("linear_fc1", "linear_fc2"):
        each = [torch.stack([packed(hf, i, e, name) for e in range(EXPERTS)]) for i in layers]
        want[f"mlp.experts.experts.{name}.weight"] = torch.stack(each)
    assert want["mlp.experts.experts.linear_fc1.weight"].shape == (LAYERS, EXPERTS, 2 * WIDTH, HIDDEN)
    assert want["mlp.experts.experts.linear_fc2.weight"].shape == (LAYERS, EXPERTS, HIDDEN, WIDTH)
    got = {f"decoder.layers.{name}": torch.full_like(tensor, float("nan")) for name, tensor in want.items()}
    dcp.load(got, checkpoint_id=str(imported), no_dist=True)
    for name, tensor in want.items():
        assert torch.equal(got[f"decoder.layers.{name}"], tensor), name
    keys = dcp.FileSystemReader(str(imported)).read_metadata().state_dict_metadata
    state = "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_"
    assert {f"{state}{i}.{e}_{LAYERS}.{EXPERTS}" for i in layers for e in range(EXPERTS)} == {
        key for key in keys if key.startswith(state)
    }


@pytest.mark.parametrize("form", ["stacked", "layers", "experts", "singletons"])
def test_every_form_in_which_mcore_may_have_saved(tmp_path, moe, imported, form):
    """Experts stacked with the layers, stacked in each layer, one by one, and one by one with gate and up apart."""
    metadata = dcp.FileSystemReader(str(imported)).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=torch.bfloat16) for k, m in metadata.items() if hasattr(m, "size")}
    dcp.load(state, checkpoint_id=str(imported), no_dist=True)
    for key in [k for k in state if "layers." in k and form != "stacked"]:
        for i, layer in enumerate(state.pop(key)):
            name = key.replace("layers.", f"layers.{i}.")
            if ".experts." not in key or form == "layers":
                state[name] = layer.clone()
                continue
            for e, expert in enumerate(layer):
                single = name.replace(".experts.experts.", f".experts.experts.{e}.")
                if form == "singletons" and "linear_fc1" in key:
                    state[f"{single}_w"], state[f"{single}_v"] = (half.clone() for half in expert.chunk(2))
                else:
                    state[single] = expert.clone()
    dcp.save(state, checkpoint_id=str(tmp_path / "ckpt"), no_dist=True)
    shutil.copytree(imported / "hf", tmp_path / "ckpt" / "hf")
    assert inspect(tmp_path / "ckpt")["stacked"] == (form == "stacked")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(moe, tmp_path / "back")


def test_every_rank_gets_its_experts(moe):
    hf = read_weights(moe)
    with open_weights(moe) as (plan, shards):
        for ep, tp in ((1, 1), (2, 1), (3, 1), (1, 2), (3, 2)):
            for rank in range(ep):
                cut = {"expert_tp": tp, "expert_tp_rank": tp - 1}
                got = dict(rank_state_dict(plan, shards, ep=ep, ep_rank=rank, **cut))
                assert sum(".experts." in name for name in got) == 2 * LAYERS * EXPERTS // ep
                for layer in range(LAYERS):
                    for local in range(EXPERTS // ep):
                        expert = rank * (EXPERTS // ep) + local
                        prefix = f"decoder.layers.{layer}.mlp.experts.experts.{local}."
                        halves = packed(hf, layer, expert, "linear_fc1").chunk(2)
                        want = torch.cat([half.chunk(tp)[-1] for half in halves])
                        assert torch.equal(got[f"{prefix}linear_fc1.weight"], want)
                        want = packed(hf, layer, expert, "linear_fc2").chunk(tp, 1)[-1]
                        assert torch.equal(got[f"{prefix}linear_fc2.weight"], want)
                assert torch.equal(got["decoder.layers.1.mlp.router.weight"], hf["model.layers.1.mlp.gate.weight"])
        with pytest.raises(ConfigError, match="experts: 6 is not divisible by expert parallelism 4"):
            list(rank_state_dict(plan, shards, ep=4))


def test_a_missing_or_unknown_expert_is_named(tmp_path, moe):
    other = Path(shutil.copytree(moe, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_local_experts": EXPERTS + 1}))
    with pytest.raises(IntegrityError, match=rf"are missing: model\.layers\.0\.mlp\.experts\.{EXPERTS}\.down_proj"):
        import_hf(other, tmp_path / "more")
    (other / "config.json").write_text(json.dumps(config | {"num_local_experts": EXPERTS - 1}))
    with pytest.raises(UnsupportedModelError, match=rf"would be lost: model\.layers\.0\.mlp\.experts\.{EXPERTS - 1}\."):
        import_hf(other, tmp_path / "fewer")
