"""Whole folders: there and back is the same to the byte; what torch reads is what was meant; damage is found."""

import filecmp
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megafuse.cli.convert import COMMANDS
from megafuse.converters.dcp_reader import DcpFolder
from megafuse.converters.digest import cached_digest, weights_digest
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.converters.inspect import inspect
from megafuse.converters.safetensors_io import SafetensorsFolder, parse_header
from megafuse.converters.verify import verify
from megafuse.errors import ConfigError, DataError, IntegrityError, UnsupportedModelError
from megafuse.model.arch import read_arch
from megafuse.testing.tiny import write_tiny_llama

LAYERS, HIDDEN, HEADS, KV, VOCAB = 3, 36, 9, 3, 53


def tiny(folder: Path, *, tied: bool, shards: int = 1, dtype: torch.dtype = torch.bfloat16, head: bool = False) -> Path:
    """A random model as others publish it: `shards` files, `__metadata__`, an index, tokenizer files, chat template."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    write_tiny_llama(folder, seed=seed, layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=KV, vocab=VOCAB, tied=tied)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    if head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_shards(folder, weights, shards)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # not the style that anybody would re-create
    (folder / "tokenizer.json").write_bytes(os.urandom(1000))
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (folder / "LICENSE").write_text("as is")
    return folder


def save_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    metadata = {"format": "pt", "note": "kept \u00e9"}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata)
        return
    names = sorted(weights, key=lambda name: name[::-1])  # q, k and v of a layer end up in different files
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: weights[n] for n in names[i::shards]}, folder / file, metadata)
        weight_map |= dict.fromkeys(names[i::shards], file)
    total = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_folder(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "hf", tied=False, shards=4)


@pytest.fixture(scope="module")
def imported(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "ckpt"
    import_hf(model, out, block_mb=1)
    return out


@pytest.fixture
def ckpt(imported, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(imported, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_is_the_same_to_the_byte(tmp_path, tied, shards, dtype):
    hf = tiny(tmp_path / "hf", tied=tied, shards=shards, dtype=dtype)
    report = import_hf(hf, tmp_path / "ckpt")
    assert report.skipped == () and report.parameters == sum(t.numel() for t in read_weights(hf).values())
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(hf, tmp_path / "back")
    assert report.weights_sha256 == weights_digest(hf) == weights_digest(tmp_path / "ckpt")
    assert read_arch(tmp_path / "ckpt") == read_arch(hf)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_small_blocks_change_nothing(tmp_path, model, block):
    """Blocks of a few rows: the engine's row arithmetic, at sizes that no real block has."""
    from megafuse.converters import dcp_writer, folders
    from megafuse.converters.digest import WeightsHasher
    from megafuse.converters.views import stream

    with folders.open_weights(model) as (plan, shards):
        hasher = WeightsHasher(plan)
        dcp_writer.write_torch_dist(plan, shards, tmp_path / "ckpt", block_bytes=block * 2 * HIDDEN, seen=hasher.add)
        assert hasher.finish(shards) == weights_digest(model)
    shutil.copytree(model, tmp_path / "ckpt" / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = read_weights(model)
    with folders.open_weights(tmp_path / "ckpt") as (plan, view):
        for name in plan.hf_shapes:
            data = b"".join(bytes(b) for b in stream(view, name, bytearray(block * 2 * HIDDEN)))
            assert data == bytes(weights[name].contiguous().view(-1).view(torch.uint8).numpy()), name


def test_torch_reads_what_mcore_means(imported, model):
    """The files through torch's own reader, against tensors packed by reshaping whole weights."""
    hf = read_weights(model)
    layer = lambda i, name: hf[f"model.layers.{i}.{name}.weight"]  # noqa: E731
    split = lambda w: w.reshape(KV, -1, HIDDEN)  # noqa: E731
    want = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    stacked = {
        "self_attention.linear_qkv.weight": lambda i: torch.cat(
            [split(layer(i, f"self_attn.{n}_proj")) for n in "qkv"], dim=1
        ).reshape(-1, HIDDEN),
        "self_attention.linear_qkv.layer_norm_weight": lambda i: layer(i, "input_layernorm"),
        "self_attention.linear_proj.weight": lambda i: layer(i, "self_attn.o_proj"),
        "mlp.linear_fc1.layer_norm_weight": lambda i: layer(i, "post_attention_layernorm"),
        "mlp.linear_fc1.weight": lambda i: torch.cat([layer(i, "mlp.gate_proj"), layer(i, "mlp.up_proj")]),
        "mlp.linear_fc2.weight": lambda i: layer(i, "mlp.down_proj"),
    }
    for name, pack in stacked.items():
        want[f"decoder.layers.{name}"] = torch.stack([pack(i) for i in range(LAYERS)])
    got = {name: torch.full_like(tensor, float("nan")) for name, tensor in want.items()}
    dcp.load(got, checkpoint_id=str(imported), no_dist=True)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    common = torch.load(imported / "common.pt", weights_only=True)
    assert common == {"content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False}}


def test_layers_that_another_program_stored_in_one_piece(tmp_path, imported, model):
    """torch's own writer puts all layers of a stacked tensor into one item; vocabulary padding comes with it."""
    with DcpFolder(imported) as weights:
        keys = {name.replace(f"layers.{i}.", "layers.") for i in range(LAYERS) for name in weights.names()}
        keys = {key for key in keys if "layers." not in key or not key.split(".")[2].isdigit()}
    metadata = dcp.FileSystemReader(str(imported)).read_metadata().state_dict_metadata
    state = {key: torch.empty(metadata[key].size, dtype=torch.bfloat16) for key in keys}
    dcp.load(state, checkpoint_id=str(imported), no_dist=True)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[key] = torch.cat((state[key], torch.rand(3, HIDDEN).bfloat16()))
    dcp.save(state, checkpoint_id=str(tmp_path / "ckpt"), no_dist=True)
    shutil.copytree(imported / "hf", tmp_path / "ckpt" / "hf")
    assert inspect(tmp_path / "ckpt")["padded"].keys() == {"embedding.word_embeddings.weight", "output_layer.weight"}
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(model, tmp_path / "back")


def test_equal_weights_give_equal_files(tmp_path, model, imported):
    import_hf(model, tmp_path / "again", block_mb=1)
    for name in (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "hf/layout.json"):
        assert (tmp_path / "again" / name).read_bytes() == (imported / name).read_bytes(), name


def test_digest_sees_weights_not_layout(tmp_path, model):
    weights = read_weights(model)
    other = Path(shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("model*")))
    save_shards(other, weights, 2)
    (other / "tokenizer.json").write_text("another")
    assert weights_digest(other) == weights_digest(model)
    flipped = weights["model.layers.1.mlp.up_proj.weight"]
    flipped.view(torch.int16)[-1, -1] ^= 1
    save_shards(other, weights, 2)
    assert weights_digest(other) != weights_digest(model)
    half = {name: tensor.view(torch.float16) for name, tensor in read_weights(model).items()}  # the same bits
    save_shards(other, half, 1)
    (other / "model.safetensors.index.json").unlink()
    assert weights_digest(other) != weights_digest(model)


def test_cached_digest_is_kept_in_the_manifest(ckpt, model):
    digest = cached_digest(model)
    assert cached_digest(ckpt) == digest
    manifest = json.loads((ckpt / "manifest.json").read_text())
    del manifest["weights_sha256"]  # as a training run writes it
    (ckpt / "manifest.json").write_text(json.dumps(manifest))
    assert cached_digest(ckpt, store=False) == digest
    assert "weights_sha256" not in json.loads((ckpt / "manifest.json").read_text())
    assert cached_digest(ckpt) == digest
    assert json.loads((ckpt / "manifest.json").read_text()) == {**manifest, "weights_sha256": digest}


def test_tied_model_that_also_holds_its_output_layer(tmp_path):
    hf = tiny(tmp_path / "hf", tied=True, shards=3, head=True)
    import_hf(hf, tmp_path / "ckpt")
    with DcpFolder(tmp_path / "ckpt") as weights:
        assert "output_layer.weight" not in weights.names()
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(hf, tmp_path / "back")
    weights = read_weights(hf)
    weights["lm_head.weight"][-1, -1] += 1
    save_shards(hf, weights, 3)
    with pytest.raises(DataError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        import_hf(hf, tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_derived_buffers_of_old_models_are_carried_along(tmp_path):
    hf = tiny(tmp_path / "hf", tied=False)
    weights = read_weights(hf)
    digest = weights_digest(hf)
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(LAYERS)}
    save_shards(hf, weights, 2)
    assert import_hf(hf, tmp_path / "ckpt").weights_sha256 == digest
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(hf, tmp_path / "back")


def test_any_header_style_survives(tmp_path):
    """Headers of other writers: spaces, another key order, no `__metadata__`, more padding."""
    hf = tiny(tmp_path / "hf", tied=True)
    raw = (hf / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(dict(reversed(header.items())), indent=1).encode() + b" " * 13
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    import_hf(hf, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(hf, tmp_path / "back")


def test_dtype_conversion(tmp_path, ckpt, model):
    export_hf(ckpt, tmp_path / "wide", dtype="float32")
    wide, weights = read_weights(tmp_path / "wide"), read_weights(model)
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in weights.items())
    config, index = (
        json.loads((tmp_path / "wide" / n).read_text()) for n in ("config.json", "model.safetensors.index.json")
    )
    assert config == {**json.loads((model / "config.json").read_text()), "dtype": "float32"}
    assert index["metadata"]["total_size"] == 4 * sum(t.numel() for t in weights.values())
    with SafetensorsFolder(tmp_path / "wide") as shards:
        assert {h.metadata["note"] for h in shards.headers.values()} == {"kept \u00e9"}
    noisy = {name: torch.randn_like(tensor) for name, tensor in wide.items()}
    save_shards(tmp_path / "wide", noisy, 2)
    for old in (tmp_path / "wide").glob("*-of-00004.safetensors"):
        old.unlink()
    import_hf(tmp_path / "wide", tmp_path / "ckpt32")
    report = export_hf(tmp_path / "ckpt32", tmp_path / "narrow", dtype="bfloat16")
    narrow = read_weights(tmp_path / "narrow")
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in noisy.items())
    assert report.weights_sha256 == weights_digest(tmp_path / "narrow") != weights_digest(tmp_path / "ckpt32")


def test_like_takes_the_layout_of_another_folder(tmp_path, ckpt, model):
    like = Path(shutil.copytree(model, tmp_path / "like", ignore=shutil.ignore_patterns("model*")))
    save_shards(like, {name: torch.zeros_like(tensor) for name, tensor in read_weights(model).items()}, 2)
    (like / "tokenizer.json").write_text("newer")
    shutil.rmtree(ckpt / "hf")  # as a checkpoint of another program: no hf/, no manifest
    (ckpt / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="like"):
        export_hf(ckpt, tmp_path / "out")
    export_hf(ckpt, tmp_path / "out", like=like)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "newer"
    assert weights_digest(tmp_path / "out") == weights_digest(model)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in like.iterdir())


def test_like_of_another_model_is_refused(tmp_path, ckpt, model):
    like = Path(shutil.copytree(model, tmp_path / "like"))
    config = json.loads((like / "config.json").read_text())
    (like / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(ConfigError, match="another model"):
        export_hf(ckpt, tmp_path / "out", like=like)


# ---- damage ------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at if at >= 0 else path.stat().st_size + at)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def last_byte(ckpt: Path, key: str) -> int:
    """Offset of the last byte of a saved tensor, found with pickle and zip."""
    stored = pickle.loads((ckpt / ".metadata").read_bytes()).storage_data
    info = next(info for index, info in stored.items() if index.fqn == key)
    raw = (ckpt / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    (data,) = [z for z in zipfile.ZipFile(io.BytesIO(raw)).infolist() if "/data/" in z.filename]
    name, extra = struct.unpack("<HH", raw[data.header_offset + 26 : data.header_offset + 30])
    return info.offset + data.header_offset + 30 + name + extra + data.file_size - 1


def test_verify_accepts_what_is_whole(imported, model):
    report = verify(imported, model)
    assert report.tensors == 3 + 9 * LAYERS and report.side_files_differ == () and report.unhashed == ()
    assert report.weights_sha256 == weights_digest(model)


def test_one_flipped_bit_is_found(tmp_path, ckpt, model):
    flip(ckpt / "__0_0.distcp", last_byte(ckpt, "output_layer.weight"))
    with pytest.raises(IntegrityError, match=r"damaged.*__0_0\.distcp") as caught:
        verify(ckpt)
    assert caught.value.exit_code == 3
    with pytest.raises(IntegrityError, match="not those of its manifest"):
        export_hf(ckpt, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    manifest = json.loads((ckpt / "manifest.json").read_text())
    del manifest["files"]["__0_0.distcp"]["sha256"], manifest["weights_sha256"]
    (ckpt / "manifest.json").write_text(json.dumps(manifest))
    assert verify(ckpt).unhashed == ("__0_0.distcp",)
    with pytest.raises(IntegrityError, match="1 of 30 tensors differ"):
        verify(ckpt, model)


@pytest.mark.parametrize("manifest", [True, False])
def test_truncation_is_found_without_hashing(tmp_path, ckpt, manifest):
    if not manifest:
        (ckpt / "manifest.json").unlink()
    data = ckpt / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=r"__0_0\.distcp"):
        export_hf(ckpt, tmp_path / "out")
    data.unlink()
    with pytest.raises(IntegrityError, match=r"__0_0\.distcp"):
        export_hf(ckpt, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_file_of_another_size_is_found_without_hashing(tmp_path, ckpt):
    with (ckpt / "hf" / "tokenizer.json").open("ab") as file:
        file.write(b"x")
    for refuses in (lambda: export_hf(ckpt, tmp_path / "out"), lambda: cached_digest(ckpt), lambda: inspect(ckpt)):
        with pytest.raises(IntegrityError, match=r"tokenizer\.json has 1001 bytes, its manifest says 1000"):
            refuses()


@pytest.mark.parametrize("offsets", [([0, 8], [0, 8]), ([0, 8], [4, 12]), ([0, 8], [12, 20]), ([4, 12], [12, 20])])
def test_tensors_that_overlap_or_leave_a_hole_are_refused(offsets):
    fields = {f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": at} for i, at in enumerate(offsets)}
    with pytest.raises(IntegrityError, match="hole, overlaps"):
        parse_header(json.dumps(fields), "file")


@pytest.mark.parametrize("name", ["hf/tokenizer.json", "hf/config.json", ".metadata", "common.pt"])
def test_every_file_is_hashed(ckpt, name):
    flip(ckpt / name, -2)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        verify(ckpt)


def test_verify_tells_models_and_side_files_apart(tmp_path, imported, model):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "tokenizer.json").write_text("another")
    (other / "extra.txt").write_text("x")
    assert verify(imported, other).side_files_differ == ("extra.txt", "tokenizer.json")
    file = next(iter(sorted(other.glob("*.safetensors"))))
    flip(file, -1)
    with pytest.raises(IntegrityError, match="1 of 30 tensors differ"):
        verify(imported, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(IntegrityError, match="different models"):
        verify(imported, other)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_pickle_that_is_no_metadata_is_not_run(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (ckpt / "manifest.json").unlink()
    (ckpt / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(IntegrityError, match=r"posix\.system|nt\.system|os\.system"):
        weights_digest(ckpt)
    assert not (tmp_path / "owned").exists()
    (ckpt / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(IntegrityError, match="is damaged"):
        weights_digest(ckpt)


def test_names_that_leave_the_folder_are_refused(tmp_path, ckpt, model):
    hf = Path(shutil.copytree(model, tmp_path / "evil"))
    index = hf / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "x\0y", 3):
        first = next(iter(good["weight_map"]))
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], first: name}}))
        with pytest.raises(DataError, match="not a plain file name"):
            import_hf(hf, tmp_path / "no")
    layout = json.loads((ckpt / "hf" / "layout.json").read_text())
    layout["files"][0]["name"] = "../../owned"
    (ckpt / "manifest.json").unlink()
    (ckpt / "hf" / "layout.json").write_text(json.dumps(layout))
    with pytest.raises(DataError, match="not a plain file name"):
        export_hf(ckpt, tmp_path / "no")


def corrupt_header(path: Path, change) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: {k: {**v, "shape": [-1, -1]} if k == "model.norm.weight" else v for k, v in h.items()},
        lambda h: {k: {**v, "dtype": "F32"} if k == "model.norm.weight" else v for k, v in h.items()},
        lambda h: {k: {**v, "data_offsets": [0, 72]} if k == "model.norm.weight" else v for k, v in h.items()},
        lambda h: {k: v for k, v in h.items() if k != "model.norm.weight"},
        lambda h: {**h, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        lambda h: [],
    ],
)
def test_contradictory_headers_are_refused(tmp_path, change):
    hf = tiny(tmp_path / "hf", tied=True)
    corrupt_header(hf / "model.safetensors", change)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        import_hf(hf, tmp_path / "no")


def test_truncated_or_missing_shards_are_refused(tmp_path, model):
    hf = Path(shutil.copytree(model, tmp_path / "hf"))
    shard = sorted(hf.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=r"00002-of-00004.*its header describes"):
        import_hf(hf, tmp_path / "no")
    for size in (0, 7, 9):
        os.truncate(shard, size)
        with pytest.raises(IntegrityError, match="00002-of-00004"):
            import_hf(hf, tmp_path / "no")
    shard.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        import_hf(hf, tmp_path / "no")
    (hf / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match="3 other"):
        import_hf(hf, tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_weights_that_would_be_lost_are_refused(tmp_path, ckpt, model):
    hf = Path(shutil.copytree(model, tmp_path / "hf"))
    weights = read_weights(hf) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}
    save_shards(hf, weights, 4)
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        import_hf(hf, tmp_path / "no")
    (ckpt / "manifest.json").unlink()
    config = json.loads((ckpt / "hf" / "config.json").read_text())
    (ckpt / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS - 1}))
    with pytest.raises(UnsupportedModelError, match=r"decoder\.layers\.2\."):
        export_hf(ckpt, tmp_path / "no")
    (ckpt / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS + 1}))
    with pytest.raises(IntegrityError, match=r"missing.*decoder\.layers\.3\."):
        export_hf(ckpt, tmp_path / "no")


# ---- folders -----------------------------------------------------------------------------------------------------


def test_outputs_are_whole_or_absent(tmp_path, model, imported):
    out = tmp_path / "out"
    import_hf(model, out)
    with pytest.raises(ConfigError, match="exists"):
        import_hf(model, out)
    before = (out / "manifest.json").read_bytes()
    bad = Path(shutil.copytree(model, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB + 1}))
    with pytest.raises(IntegrityError, match=r"config\.json implies"):
        import_hf(bad, out, overwrite=True)
    assert (out / "manifest.json").read_bytes() == before
    export_hf(imported, out, overwrite=True)
    assert_same_folder(model, out)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="no model folder"):
        export_hf(imported, tmp_path / "home", overwrite=True)
    for inside in (model, model / "x", model.parent):
        with pytest.raises(ConfigError, match="overlaps"):
            import_hf(model, inside, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "home", "out"]


def test_what_is_not_copied_is_named(tmp_path, model):
    hf = Path(shutil.copytree(model, tmp_path / "hf"))
    (hf / "original").mkdir()
    (hf / "consolidated.00.pth").write_bytes(b"x")
    assert import_hf(hf, tmp_path / "ckpt").skipped == ("consolidated.00.pth", "original/")
    with pytest.raises(ConfigError, match="is a checkpoint"):
        import_hf(tmp_path / "ckpt", tmp_path / "no")
    with pytest.raises(ConfigError, match="no checkpoint"):
        export_hf(hf, tmp_path / "no")
    with pytest.raises(ConfigError, match="no fp32 master"):
        export_hf(tmp_path / "ckpt", tmp_path / "no", source="fp32-master")
    with pytest.raises(ConfigError, match="dtype"):
        export_hf(tmp_path / "ckpt", tmp_path / "no", dtype="float16")


def test_inspect(imported, model):
    one, two = inspect(imported), inspect(model)
    shared = ("architecture", "parameters", "stored", "missing", "unexpected", "padded")
    assert {k: one[k] for k in shared} == {k: two[k] for k in shared}
    assert one["kind"] == "torch_dist" and one["stacked"] and not one["optimizer"] and one["step"] == 0
    assert two["kind"] == "huggingface" and len(two["shards"]) == 4 and two["dtypes"] == {"BF16": 3 + 9 * LAYERS}
    json.dumps(one), json.dumps(two)


def test_commands(tmp_path, model, capsys):
    def call(name, **fields):
        config, run = COMMANDS[name]
        return run(config(**fields))

    assert call("import", hf_dir=model, out=tmp_path / "ckpt") == 0
    assert call("export", ckpt=tmp_path / "ckpt", out=tmp_path / "back") == 0
    assert call("verify", src=tmp_path / "ckpt", dst=tmp_path / "back", upto="bits") == 0
    assert call("verify", src=tmp_path / "back", dst=tmp_path / "ckpt", upto="plan") == 0
    assert call("inspect", path=tmp_path / "ckpt") == 0
    said = capsys.readouterr().out
    assert "30 tensors are equal in every bit" in said and weights_digest(model) in said


PEAK = """
import sys
from megafuse.converters.importer import import_hf
from megafuse.converters.exporter import export_hf
hf, out = sys.argv[1:]
import_hf(hf, out + "/ckpt")
print(export_hf(out + "/ckpt", out + "/back").peak_rss_mib)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """100 MB and 300 MB through fresh processes: the same peak, most of it `import torch`."""
    peaks = []
    for layers in (5, 25):
        hf = tmp_path / f"hf{layers}"
        hf.mkdir()
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024,
            "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        }  # fmt: skip
        (hf / "config.json").write_text(json.dumps(config))
        shapes = {"model.embed_tokens.weight": (32000, 1024), "model.norm.weight": (1024,)}
        for i in range(layers):
            p = f"model.layers.{i}."
            shapes |= {p + n: (1024,) for n in ("input_layernorm.weight", "post_attention_layernorm.weight")}
            shapes |= {p + f"self_attn.{n}_proj.weight": (r, 1024) for n, r in zip("qkvo", (1024, 512, 512, 1024))}
            shapes |= {p + f"mlp.{n}_proj.weight": (1536, 1024) for n in ("gate", "up")}
            shapes[p + "mlp.down_proj.weight"] = (1024, 1536)
        header, at = {}, 0
        for name, shape in shapes.items():
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with (hf / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at - 1000)  # zeros: what is measured is memory
            file.seek(0, 2)
            file.write(os.urandom(1000))
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(hf), str(tmp_path / f"out{layers}")],
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]))
        assert filecmp.cmp(hf / "model.safetensors", tmp_path / f"out{layers}/back/model.safetensors", shallow=False)
    print("peak MiB", peaks)
    assert peaks[1] < 500 and abs(peaks[1] - peaks[0]) < 40
