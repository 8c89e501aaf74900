"""Held-out evaluation: its numbers, which checkpoint they make the best, and a stop in the middle of it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.checkpoint import folder as folders
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError, PreemptedError
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.oracle import double_model, group_loss, response_logps
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training import held_out
from megafuse.training.run import train

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held_out")
    import_hf(write_tiny_llama(root / "hf", seed=3), root / "model")
    write_tiny_llama(root / "other", seed=8)
    for number, kind in enumerate(("pair", "sft")):
        write_tiny_dataset(root / kind, kind, seed=4 + number)
        rename(write_tiny_dataset(root / f"held_out_{kind}", kind, seed=9 + number, groups=7))
    return root


def rename(folder: Path) -> None:
    """Other prompt ids than those of the training data, of the same length: the file stays valid."""
    for path in (folder / "groups").glob("*.arrow"):
        path.write_bytes(path.read_bytes().replace(b"p000", b"h000"))


def config(inputs: Path, run: Path, **changes: Any) -> TrainConfig:
    kind = "sft" if changes.get("loss", {}).get("name") == "sft" else "pair"
    settings = {
        "loss": {"name": "simpo", "beta": 2.0, "gamma": 0.5},
        "optim": {"lr": 1e-30},
        "held_out": {"dataset": inputs / f"held_out_{kind}"},
        "global_batch_size": 4,
        "max_steps": 1,
    }
    return tiny_run(run, inputs / "model", inputs / kind, **{**settings, **changes})


def expected(inputs: Path, settings: TrainConfig) -> dict[str, float]:
    """Loss, and margin where there is one, in float64: transformers' model, one response at a time."""
    policy, frozen = double_model(inputs / "hf"), double_model(inputs / "other")
    total = margin = weight = 0.0
    assert settings.held_out.dataset is not None
    for group in GroupDataset(settings.held_out.dataset):
        with torch.no_grad():
            logps, ref = response_logps(policy, group), response_logps(frozen, group)
        total += float(group_loss(settings.loss, group, logps, ref, 1.0)[0])
        lengths = group.response_lengths
        if settings.loss.name == "sft":
            weight += float((group.weights * lengths[group.members[:, 0]]).sum())
            continue
        weight += 1.0
        score = logps / torch.from_numpy(lengths.astype(np.float64)) if settings.loss.name == "simpo" else logps - ref
        for (won, lost), w in zip(group.members, group.weights):
            margin += float(w) * float(settings.loss.beta or 0) * float(score[won] - score[lost])
    return {"loss": total / weight, **({} if settings.loss.name == "sft" else {"margin": margin / weight})}


DPO = {"loss": {"name": "dpo", "beta": 0.3}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": DPO,
    "tp": {**DPO, "parallel": {"tensor": 2, "sequence": True}},
    "pp": {"parallel": {"pipeline": 2}},
    "cp": {"parallel": {"context": 2}},
    "sft": {"loss": {"name": "sft", "reduction": "token_mean"}},
}


def test_the_numbers_are_those_of_float64_at_every_layout(inputs: Path, tmp_path: Path) -> None:
    configs = {name: config(inputs, tmp_path / name, reference={"model": inputs / "other"}, **changes)
               for name, changes in LAYOUTS.items()}  # fmt: skip
    run_distributed(run_trainings, 2, list(configs.values()), timeout=900)
    for name, settings in configs.items():
        (record,) = read_metrics(settings.run_dir)
        want = expected(inputs, settings)
        found = {key: record[f"held_out/{key}"] for key in want}
        assert found == pytest.approx(want, rel=2e-5, abs=1e-5), name
        manifest = folders.read_manifest(settings.run_dir / "checkpoints" / folders.step_name(1))["held_out"]
        assert manifest["score"] == (found["margin"] if "margin" in found else -found["loss"])
        assert (settings.run_dir / "checkpoints" / folders.BEST).read_text() == "step_00000001\n"


def test_prompts_that_are_trained_on_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shares 24 of its 24 prompts with data.dataset = .*, 'p0000' the first"):
        train(config(inputs, tmp_path / "run", held_out={"dataset": inputs / "pair"}))


def test_a_stop_is_honoured_between_two_batches(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"optim": {"lr": 1e-3}, "checkpoint": {"interval": 2, "keep": 9}, "max_steps": 5}
    whole, stopped = (config(inputs, tmp_path / name, **more) for name in ("whole", "stopped"))
    train(whole)
    passes, forward = [0], held_out._forward

    def interrupted(*args: Any) -> Any:
        passes[0] += 1
        if passes[0] == 3:  # the first of two batches at step 4
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(*args)

    monkeypatch.setattr(held_out, "_forward", interrupted)
    with pytest.raises(PreemptedError, match="after step 4"):
        train(stopped)
    assert passes[0] == 3
    checkpoints = stopped.run_dir / "checkpoints"
    assert folders.read_manifest(checkpoints / folders.step_name(4))["held_out"] is None
    assert "held_out/margin" not in read_metrics(stopped.run_dir)[3]
    train(stopped)
    clock = ("step_seconds", "tokens_per_second", "mfu")
    first, second = ([{k: v for k, v in record.items() if k not in clock} for record in read_metrics(c.run_dir)]
                     for c in (whole, stopped))  # fmt: skip
    assert first == second and "held_out/margin" in second[3]
    for step in (2, 4, 5):
        facts = [folders.read_manifest(c.run_dir / "checkpoints" / folders.step_name(step))["held_out"]
                 for c in (whole, stopped)]  # fmt: skip
        assert facts[0] == facts[1] and facts[0]["margin"] == second[step - 1]["held_out/margin"]
    scores = folders.scores(checkpoints)
    best = max((4, 5), key=lambda step: scores[step])
    assert (checkpoints / folders.BEST).read_text() == f"{folders.step_name(best)}\n"


def test_the_best_of_the_last_two_stays(inputs: Path, tmp_path: Path) -> None:
    kept = []
    for step, score in enumerate((0.1, 0.5, 0.3, 0.2, None, 0.4), start=1):
        folder = folders.begin(tmp_path, step)
        (folder / "weights.bin").write_bytes(b"1")
        facts = {"step": step, "held_out": None if score is None else {"score": score}}
        folders.commit(folder, inputs / "model", facts, keep=1, best_of=2)
        kept.append((folders.complete_steps(tmp_path), int((tmp_path / folders.BEST).read_text()[5:])))
    assert kept == [([1], 1), ([2], 2), ([2, 3], 2), ([3, 4], 3), ([3, 4, 5], 3), ([6], 6)]
    for step, data, beta in ((7, "a", 1), (8, "b", 1), (9, "b", 1), (10, "b", 2)):  # scores of other prompts or losses
        folder = folders.begin(tmp_path, step)
        changes = [{"field": "epochs", "now": step}, {"field": "loss.beta", "now": beta}]
        facts = {"step": step, "held_out": {"score": -step, "data": data}, "changes": changes}
        folders.commit(folder, inputs / "model", facts, keep=9, best_of=2)
        kept.append((folders.complete_steps(tmp_path), int((tmp_path / folders.BEST).read_text()[5:])))
    assert [best for _, best in kept[-4:]] == [7, 8, 8, 10]
    for step in (7, 8, 9, 10):
        folders.set_aside(tmp_path / folders.step_name(step))
    (tmp_path / folders.step_name(6) / "manifest.json").write_text(json.dumps({"format": folders.FORMAT}))
    assert folders.best_step(tmp_path, 2) is None
