"""Every family there and back, and what is not as it should be: named, refused, nothing written."""

import errno
import filecmp
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafuse.cli.convert import COMMANDS
from megafuse.converters import dcp_writer
from megafuse.converters.digest import weights_digest
from megafuse.converters.direct import fill
from megafuse.converters.exporter import export_hf
from megafuse.converters.folders import open_weights
from megafuse.converters.importer import dry_run, import_hf
from megafuse.converters.verify import verify
from megafuse.errors import DataError, IntegrityError, StorageError, UnsupportedModelError
from megafuse.testing.families import WRITERS, publish

FAMILIES = sorted(WRITERS)


def write(folder: Path, family: str, *, tied: bool, dtype: str = "bfloat16", shards: int = 1) -> Path:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    WRITERS[family](folder, seed=seed, layers=3, hidden=32, heads=4, kv_heads=2, vocab=53, tied=tied)
    return publish(folder, dtype=dtype, shards=shards)


def assert_same_folder(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tied", "shards", "dtype"), [(True, 1, "bfloat16"), (False, 4, "float32")])
def test_there_and_back_is_the_same_to_the_byte(tmp_path, family, tied, shards, dtype):
    hf = write(tmp_path / "hf", family, tied=tied, shards=shards, dtype=dtype)
    planned = dry_run(hf, tmp_path / "ckpt")
    report = import_hf(hf, tmp_path / "ckpt", block_mb=1)
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_folder(hf, tmp_path / "back")
    assert report.weights_sha256 == weights_digest(hf) == weights_digest(tmp_path / "ckpt")
    assert verify(tmp_path / "ckpt", hf).tensors == sum(len(load_file(f)) for f in hf.glob("*.safetensors"))
    assert (planned.parameters, planned.tensors, planned.bytes) == (report.parameters, report.tensors, report.bytes)
    for name, size in planned.files.items():
        written = (tmp_path / "ckpt" / name).stat().st_size
        assert size == written if name.startswith("hf/") else size < written < 1.5 * size + 200_000, name
    assert planned.fits and planned.skipped == ()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gemma") / "hf", "gemma2", tied=True, shards=3)


def shard_with(folder: Path, part: str) -> tuple[Path, str]:
    """The file that holds the first tensor whose name contains `part`, and that name."""
    files = {file: list(load_file(file)) for file in sorted(folder.glob("*.safetensors"))}
    return next((file, name) for file, names in files.items() for name in names if part in name)


def rewritten(folder: Path, part: str, change) -> str:
    """Apply `change` to the dictionary of the shard that holds `part`; the tensor's name."""
    file, name = shard_with(folder, part)
    weights = load_file(file)
    change(weights, name)
    save_file(weights, file, {"format": "pt"})
    return name


def unmap(folder: Path, change) -> None:
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    change(fields["weight_map"])
    index.write_text(json.dumps(fields))


def missing_shard(folder: Path) -> str:
    file, _ = shard_with(folder, "post_feedforward")
    file.unlink()
    return file.name


def truncated_shard(folder: Path) -> str:
    file, _ = shard_with(folder, "post_feedforward")
    os.truncate(file, file.stat().st_size - 1)
    return file.name


def extra_tensor(folder: Path) -> str:
    file, name = shard_with(folder, "q_proj.weight")
    rewritten(folder, "q_proj.weight", lambda weights, _: weights.update({"model.extra": weights[name].clone()}))
    unmap(folder, lambda weight_map: weight_map.update({"model.extra": file.name}))
    return "model.extra"


def wrong_shape(folder: Path) -> str:
    return rewritten(folder, "post_feedforward", lambda w, name: w.update({name: w[name][:-1].clone()}))


def wrong_dtype(folder: Path) -> str:
    return rewritten(folder, "k_proj.weight", lambda w, name: w.update({name: w[name].double()}))


def unknown_architecture(folder: Path) -> str:
    return config(folder, architectures=["Gemma9ForCausalLM"])


def unknown_key(folder: Path) -> str:
    return config(folder, attention_sinks=4)


def unknown_value(folder: Path) -> str:
    return config(folder, hidden_activation="gelu")


def config(folder: Path, **changes: object) -> str:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return next(iter(changes))


def leaving_path(folder: Path) -> str:
    unmap(folder, lambda weight_map: weight_map.update({next(iter(weight_map)): "../elsewhere.safetensors"}))
    return "../elsewhere.safetensors"


BROKEN = (
    (missing_shard, IntegrityError),
    (truncated_shard, IntegrityError),
    (extra_tensor, UnsupportedModelError),
    (wrong_shape, IntegrityError),
    (wrong_dtype, UnsupportedModelError),
    (unknown_architecture, UnsupportedModelError),
    (unknown_key, UnsupportedModelError),
    (unknown_value, UnsupportedModelError),
    (leaving_path, DataError),
)


@pytest.mark.parametrize(("breaking", "error"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_bad_input_is_named_and_nothing_is_written(tmp_path, gemma, breaking, error):
    hf = Path(shutil.copytree(gemma, tmp_path / "hf"))
    named = breaking(hf)
    for attempt in (import_hf, dry_run):
        with pytest.raises(error) as caught:
            attempt(hf, tmp_path / "ckpt")
        assert named in str(caught.value) or "F64" in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk(tmp_path, gemma, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(StorageError, match=r"needs .* bytes, 1,000 are free"):
        import_hf(gemma, tmp_path / "ckpt")
    monkeypatch.undo()
    command, run = COMMANDS["import"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    assert run(command(hf_dir=gemma, out=tmp_path / "ckpt", dry_run=True)) == 4
    monkeypatch.undo()

    written = []

    def full(self, data):
        written.append(len(data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    monkeypatch.setattr(dcp_writer._HashingStream, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        import_hf(gemma, tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


class Poison:
    def __reduce__(self):
        return os.mkdir, ("poisoned",)


def test_a_poisoned_pickle_is_not_run(tmp_path, gemma, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import_hf(gemma, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "manifest.json").unlink()
    (tmp_path / "ckpt" / ".metadata").write_bytes(pickle.dumps(Poison()))
    for attempt in (lambda: export_hf("ckpt", "out"), lambda: verify("ckpt", gemma)):
        with pytest.raises(IntegrityError, match=r"posix\.mkdir|do not trust"):
            attempt()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_a_poisoned_tensor_is_not_run(tmp_path, gemma, monkeypatch):
    """The pickle that describes a tensor inside a `.distcp` file; `common.pt`, which no conversion reads."""
    monkeypatch.chdir(tmp_path)
    import_hf(gemma, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "manifest.json").unlink()
    (tmp_path / "ckpt" / "common.pt").write_bytes(pickle.dumps(Poison()))
    export_hf("ckpt", "out")
    assert_same_folder(gemma, tmp_path / "out")
    metadata = pickle.loads((tmp_path / "ckpt" / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn.endswith("final_layernorm.weight"))
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Poison()))
        archive.writestr("archive/data/0", bytes(64))
    with (tmp_path / "ckpt" / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), file.write(evil.getvalue())
    (tmp_path / "ckpt" / ".metadata").write_bytes(pickle.dumps(metadata))
    for attempt in (lambda: export_hf("ckpt", "no", jobs=2), lambda: verify("ckpt", gemma)):
        with pytest.raises(IntegrityError, match=r"posix\.mkdir; it is no plain tensor"):
            attempt()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "out"]


def test_a_part_of_any_tensor_comes_straight_from_the_folder(tmp_path):
    """What a rank of a tensor-parallel layout holds, by mcore's key and offset: rows, columns, padding, experts."""
    hf = write(tmp_path / "hf", "mixtral", tied=False, dtype="float32")
    weights = load_file(hf / "model.safetensors")
    expert, stack = "model.layers.2.block_sparse_moe.experts.3.", "decoder.layers.mlp.experts.experts."
    wanted = {
        ("decoder.layers.self_attention.linear_proj.weight", (1, 0, 16)): weights[
            "model.layers.1.self_attn.o_proj.weight"
        ][:, 16:],
        (f"{stack}linear_fc1.weight", (2, 3, 70, 0)): weights[f"{expert}w3.weight"][6:],
        (f"{stack}linear_fc2.weight", (2, 3, 4, 10)): weights[f"{expert}w2.weight"][4:9, 10:],
        ("output_layer.weight", (27, 0)): torch.cat((weights["lm_head.weight"][27:], torch.zeros(1, 32))),
    }
    with open_weights(hf) as (plan, view):
        for (key, offset), part in wanted.items():
            for block in (1, 1 << 20):
                target = torch.full_like(part, float("nan"))
                fill(target, plan, view, key, offset, block_bytes=block)
                assert torch.equal(target, part), key
        with pytest.raises(IntegrityError, match=r"decoder\.layers\.mlp\.linear_fc9\.weight \[0\]"):
            fill(torch.zeros(2, 32), plan, view, "decoder.layers.mlp.linear_fc9.weight", (0, 0, 0))
