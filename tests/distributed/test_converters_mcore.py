"""megatron-core itself: it loads what we write at every layout, and we read what it saves at every layout."""

import filecmp
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafuse.converters.digest import weights_digest
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.converters.inspect import inspect
from megafuse.converters.logits import compare_logits
from megafuse.converters.verify import verify
from megafuse.errors import IntegrityError
from megafuse.testing.convert_workers import load_compare_save
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama

pytestmark = pytest.mark.distributed

VOCAB = 121  # odd, so that tensor parallelism pads it
WORLDS = {
    2: ({"heads": 6, "kv_heads": 2, "hidden": 48}, {"tp1": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}),
    3: ({"heads": 9, "kv_heads": 3, "hidden": 36}, {"tp3": {"tensor": 3}}),
    4: ({"heads": 6, "kv_heads": 2, "hidden": 48}, {"tp2_pp2": {"tensor": 2, "pipeline": 2}}),
}


def bf16_model(folder: Path, *, tied: bool, **shape: int) -> Path:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    write_tiny_llama(folder, seed=seed, layers=4, vocab=VOCAB, tied=tied, **shape)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def assert_same_folder(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(("world", "tied"), [(2, True), (2, False), (3, False), (4, True)])
def test_mcore_loads_and_saves_at_every_layout(tmp_path, world, tied):
    shape, layouts = WORLDS[world]
    hf = bf16_model(tmp_path / "hf", tied=tied, **shape)
    import_hf(hf, tmp_path / "ckpt")
    ranks = run_distributed(load_compare_save, world, hf, tmp_path / "ckpt", layouts, tmp_path / "saved")
    everything = 2 + 6 * 4 + (0 if tied else 1)
    for name, fields in layouts.items():
        per_replica = sum(counts[name] for counts in ranks) // (world // fields.get("pipeline", 1))
        assert per_replica == everything + (1 if tied and "pipeline" in fields else 0)
        for kind in ("stacked", "unstacked"):
            saved = tmp_path / "saved" / f"{name}-{kind}"
            shutil.copytree(tmp_path / "ckpt" / "hf", saved / "hf")
            facts = inspect(saved)
            assert facts["stacked"] == (kind == "stacked")
            assert bool(facts["padded"]) == ("tensor" in fields)
            assert weights_digest(saved) == weights_digest(hf)
            export_hf(saved, tmp_path / "back" / saved.name)
            assert_same_folder(hf, tmp_path / "back" / saved.name)


def test_training_checkpoints(tmp_path):
    """Saved with optimizer state: the model and its fp32 master weights, which round to it, come out as HF folders."""
    hf = bf16_model(tmp_path / "hf", tied=False, heads=6, kv_heads=2, hidden=48)
    import_hf(hf, tmp_path / "ckpt")
    data = write_tiny_dataset(tmp_path / "data", "sft", seed=int.from_bytes(os.urandom(4), "little"))
    layouts = {"tp2": ({"tensor": 2}, True), "pp2": ({"pipeline": 2}, False), "dp2": ({}, True)}
    configs = [
        tiny_run(
            tmp_path / "runs" / name,
            tmp_path / "ckpt",
            data,
            model={"precision": "bf16"},
            optim={"lr": 1e-2, "distributed": distributed},
            parallel=parallel,
            max_steps=2,
        )
        for name, (parallel, distributed) in layouts.items()
    ]
    run_distributed(run_trainings, 2, configs)
    before = load_file(hf / "model.safetensors")
    for config in configs:
        (saved,) = (config.run_dir / "checkpoints").glob("step_*")
        assert inspect(saved)["optimizer"]
        export_hf(saved, tmp_path / "out" / config.run_dir.name)
        export_hf(saved, tmp_path / "master" / config.run_dir.name, source="fp32-master")
        model = load_file(tmp_path / "out" / config.run_dir.name / "model.safetensors")
        master = load_file(tmp_path / "master" / config.run_dir.name / "model.safetensors")
        assert model.keys() == master.keys() == before.keys()
        assert json.loads((tmp_path / "master" / config.run_dir.name / "config.json").read_text())["dtype"] == "float32"
        for name, tensor in master.items():
            assert tensor.dtype == torch.float32 and model[name].shape == before[name].shape
            assert torch.equal(tensor.bfloat16(), model[name]), name
            assert not torch.equal(model[name], before[name]), name
        assert any(not torch.equal(tensor, model[name].float()) for name, tensor in master.items())
        verify(saved, tmp_path / "out" / config.run_dir.name)
        with pytest.raises(IntegrityError, match="tensors differ"):
            verify(saved, hf)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path, tied):
    hf = write_tiny_llama(tmp_path / "hf", seed=int.from_bytes(os.urandom(4), "little"), tied=tied)
    import_hf(hf, tmp_path / "ckpt")
    report = compare_logits(tmp_path / "ckpt", hf, tokens=200)  # the knee of its rope scaling is at 64 tokens
    # of two logits closer than the bound either may be the largest: a tie is no fault
    assert report.difference < 1e-5 * report.largest and report.agree >= 0.99
    config = json.loads((hf / "config.json").read_text())
    rope = config["rope_parameters"]
    changes = [
        {"rms_norm_eps": 1e-4},
        {"rope_parameters": {**rope, "factor": 5.0}},
        {"rope_parameters": {**rope, "low_freq_factor": 0.5}},
        {"rope_parameters": {**rope, "high_freq_factor": 5.0}},
        {"rope_parameters": {**rope, "original_max_position_embeddings": 70}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {**rope, "rope_theta": 11000.0}},
        {"num_key_value_heads": config["num_key_value_heads"], "hidden_act": "gelu"},
    ]
    for change in changes:  # each number of the configuration, changed on one side only, must show
        (hf / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(IntegrityError, match="different logits"):
            compare_logits(tmp_path / "ckpt", hf, tokens=200)
