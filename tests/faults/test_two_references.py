"""A reference that is another model than the policy: refused by name, and the way that the message gives."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.cli.main import main
from megafuse.config.train import TrainConfig
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.metrics import read_metrics
from megafuse.reference.cache import part_name
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training.run import train

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy; references: of its shape (`same`), twice its width (`wide`), its shape and weights under another rotary
    base (`rope`) or epsilon (`eps`)."""
    root = tmp_path_factory.mktemp("two_models")
    for name, settings in {"policy": {"seed": 1}, "same": {"seed": 2}, "wide": {"seed": 3, "hidden": 96}}.items():
        write_tiny_llama(root / name, layers=2, **settings)
    for name, (old, new) in {"rope": ("10000.0", "500000.0"), "eps": ("1e-05", "0.01")}.items():
        shutil.copytree(root / "same", root / name)
        path = root / name / "config.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    write_tiny_dataset(root / "pair", "pair", seed=4, groups=6)
    return root


def config(inputs: Path, run: Path, reference: dict[str, Any], **settings: Any) -> TrainConfig:
    values = {"loss": {"name": "dpo", "beta": 0.3}, "global_batch_size": 3, "max_steps": 1, **settings}
    return tiny_run(run, inputs / "policy", inputs / "pair", reference=reference, **values)


def logps(folder: Path) -> np.ndarray:
    parts = sorted(folder.glob("*.npz"))
    assert [path.name for path in parts] == [part_name(i, len(parts)) for i in range(len(parts))]
    return np.concatenate([np.load(path)["logps"] for path in parts])


def oracle(model: Path, dataset: Path) -> np.ndarray:
    """Log-probs of every response by transformers, in float64, under the model's own config.json."""
    from transformers import LlamaForCausalLM

    judge = LlamaForCausalLM.from_pretrained(str(model), dtype=torch.float64)
    found = []
    for group in GroupDataset(dataset):
        for response in group.responses:
            ids = torch.tensor(np.concatenate((group.prompt, response)).astype(np.int64))
            with torch.no_grad():
                logits = judge(ids[None]).logits[0].log_softmax(-1)
            places = torch.arange(len(group.prompt), len(ids))
            found.append(float(logits[places - 1, ids[places]].sum()))
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "differs"),
    [("wide", "hidden_size: 96 and 48"), ("rope", "rope_theta: 500000.0 and 10000.0"),
     ("eps", "rms_norm_eps: 0.01 and 1e-05")],
)  # fmt: skip
def test_it_is_refused_and_the_command_in_the_message_gives_the_right_numbers(
    inputs: Path, tmp_path: Path, name: str, differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        train(config(inputs, tmp_path / "run", {"model": inputs / name}))
    told = str(caught.value)
    assert f"reference.model = {inputs / name} is another model than model.path = {inputs / 'policy'} (" in told
    assert differs in told and not (tmp_path / "run").exists()
    found = re.search(r"`megafuse (.*?)`, and give reference.path = (\S+),", told)
    assert found
    assert main([*shlex.split(found[1]), "--data.max_row_tokens", "256"]) == 0
    wanted = oracle(inputs / name, inputs / "pair")
    assert np.abs(logps(Path(found[2])) - wanted).max() < 2e-4
    assert np.abs(wanted - oracle(inputs / "policy", inputs / "pair")).max() > 0.1  # else nothing was shown
    train(config(inputs, tmp_path / "run", {"model": inputs / name, "path": Path(found[2])}))
    (record,) = read_metrics(tmp_path / "run")
    assert record["updated"]

    # the key is that of the model: another one's configuration is named
    other = {"rope": "eps", "eps": "rope", "wide": "rope"}[name]
    with pytest.raises(IntegrityError, match="architecture: the reference model's configuration: cache ") as wrong:
        train(config(inputs, tmp_path / "other", {"model": inputs / other, "path": Path(found[2])}))
    assert ("weights: " in str(wrong.value)) == (name == "wide") and not (tmp_path / "other" / "config.toml").exists()
    if name == "rope":
        assert "cache rms_norm_eps = 1e-05, rope_theta = 500000.0, this run rms_norm_eps = 0.01" in str(wrong.value)


def test_held_out_prompts_need_them_too(inputs: Path, tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "held", "pair", seed=9, groups=3)
    for path in (tmp_path / "held" / "groups").glob("*.arrow"):  # other prompts than those of training
        path.write_bytes(path.read_bytes().replace(b"p000", b"h000"))
    data, precision = ["--data.max_row_tokens", "256", "--data.dataset"], ["--model.precision", "fp32"]
    ask = ["reference", "--model.path", str(inputs / "rope"), *precision, *data]
    assert main([*ask, str(inputs / "pair"), "--out", str(tmp_path / "cache")]) == 0
    reference = {"model": inputs / "rope", "path": tmp_path / "cache"}
    mine = config(inputs, tmp_path / "run", reference, held_out={"dataset": tmp_path / "held"})
    with pytest.raises(ConfigError, match=r"--data.dataset \S*held --out \S*run/held_out_reference`, before"):
        train(mine)
    assert main([*ask, str(tmp_path / "held"), "--out", str(tmp_path / "run" / "held_out_reference")]) == 0
    train(mine)
    (record,) = read_metrics(tmp_path / "run")
    assert "held_out/loss" in record
    wanted = oracle(inputs / "rope", tmp_path / "held")
    assert np.abs(logps(tmp_path / "run" / "held_out_reference") - wanted).max() < 2e-4


def test_one_of_the_same_architecture_is_computed_in_the_run(inputs: Path, tmp_path: Path) -> None:
    train(config(inputs, tmp_path / "run", {"model": inputs / "same"}))
    assert np.abs(logps(tmp_path / "run" / "reference") - oracle(inputs / "same", inputs / "pair")).max() < 2e-4
    path = tmp_path / "run" / "reference" / "manifest.json"
    assert json.loads(json.loads(path.read_text())["digest"]["architecture"])["rope_theta"] == 10000.0


def test_caches_of_before_are_read(inputs: Path, tmp_path: Path) -> None:
    """Their keys do not say the architecture; but what a run of then computed of another architecture is wrong."""
    train(config(inputs, tmp_path / "run", {"model": inputs / "same"}))
    cache = tmp_path / "run" / "reference"
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["digest"]["architecture"]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    train(config(inputs, tmp_path / "again", {"model": inputs / "same", "path": cache}))
    train(config(inputs, tmp_path / "run", {"model": inputs / "same"}, max_steps=2, allow_change=("max_steps",)))
    assert [len(read_metrics(tmp_path / name)) for name in ("again", "run")] == [1, 2]

    shutil.copytree(cache, tmp_path / "other" / "reference")
    with pytest.raises(ConfigError, match="is another model than"):
        train(config(inputs, tmp_path / "other", {"model": inputs / "rope"}))
