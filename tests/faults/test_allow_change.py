"""`allow_change`, field by field: each that a start may not simply change acts to the run's end, or is refused."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megafuse.checkpoint.folder import complete_steps, step_name
from megafuse.config.drift import ACTS, BOUND, CONFIG_FILE, FREE
from megafuse.config.train import OptimConfig, TrainConfig
from megafuse.errors import ConfigError, IntegrityError
from megafuse.losses.registry import make_loss
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training import loop
from megafuse.training.run import train

pytestmark = pytest.mark.faults

GROUPS, BATCH, DONE = 16, 4, 2  # four steps an epoch; every trial goes on from the checkpoint of step 2
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"name": "sft"}),
    "dpo": ("pair", {"name": "dpo", "beta": 0.3}),
    "rloo": ("rloo", {"name": "rloo", "beta_kl": 0.05, "surrogate": "clipped_ratio"}),
    "wrpo": ("wrpo", {"name": "wrpo", "beta": 0.3}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, data sets of every kind, and for every loss a run of four steps: `whole`, and `half` done."""
    root = tmp_path_factory.mktemp("allow_change")
    for name, seed in (("model", 1), ("other", 2)):
        write_tiny_llama(root / name, seed=seed, layers=1)
    for name, (kind, _) in LOSSES.items():
        write_tiny_dataset(root / kind, kind, seed=3, groups=GROUPS, sources=2)
        train(config(root, root / f"{name}-whole", name))
        shutil.copytree(root / f"{name}-whole", root / f"{name}-half")
        shutil.rmtree(root / f"{name}-half" / "checkpoints" / step_name(4))
    write_held_out(root / "held_out", "sft", 9)
    return root


def write_held_out(folder: Path, kind: str, seed: int) -> None:
    """Prompts of an evaluation must be others than those of training."""
    write_tiny_dataset(folder, kind, seed=seed, groups=3)
    for path in (folder / "groups").glob("*.arrow"):  # ids of the same length: the file stays valid
        path.write_bytes(path.read_bytes().replace(b"p000", b"h000"))


def config(root: Path, run: Path, base: str, **settings: Any) -> TrainConfig:
    kind, wanted = LOSSES[base]
    values: dict[str, Any] = {
        "loss": wanted,
        "optim": {"schedule": "linear", "warmup_ratio": 0.0, "clip_grad": 1e6},
        "checkpoint": {"interval": 2, "keep": 9},
        "global_batch_size": BATCH,
    }
    for name, value in settings.items():
        merges = isinstance(value, dict) and name in values and name != "loss"
        values[name] = {**values[name], **value} if merges else value
    return tiny_run(run, root / "model", root / kind, **values)


def fields(model: type, prefix: str = "") -> list[str]:
    """Dotted names of every field of a configuration."""
    found = []
    for name, field in model.model_fields.items():
        section = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
        found += fields(field.annotation, f"{prefix}{name}.") if section else [prefix + name]
    return found


def test_every_field_is_free_acts_or_is_bound() -> None:
    everything = fields(TrainConfig)
    assert set(ACTS) | set(BOUND) <= set(everything) and "optim.lr" in everything
    for name in everything:
        free = any(name == one or name.startswith(f"{one}.") for one in FREE)
        assert free + (name in ACTS) + (name in BOUND) == 1, name
    assert set(ACTS) <= {*OPTIM, *LOSS, *REFERENCES, "epochs", "max_steps", "held_out.dataset"}  # all have a trial
    assert set(BOUND) == set(REFUSED)


def rate(update: int, total: int, optim: OptimConfig) -> float:
    """The learning rate of an update (from 0) as docs and configuration say it."""
    warmup = round(optim.warmup_ratio * total)
    if warmup and update < warmup:
        return optim.lr * (update + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    unit, end = (update + 1, total + 1) if warmup else (update, total)
    share = (unit - warmup) / (end - warmup)
    part = 1 - share if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return optim.min_lr + (optim.lr - optim.min_lr) * part


def go_on(root: Path, run: Path, base: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Go on from `half` in `run` with `changes`; (loss object, settings of the weights that decay) of every step."""
    shutil.copytree(root / f"{base}-half", run)
    seen: list[Any] = []
    original = loop.train_step

    def watched(engine: Any, topology: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        (group,) = [group for group in engine.optimizer.param_groups if group["wd_mult"]]
        names = ("lr", "weight_decay", "betas", "eps")
        seen.append((given, {**{name: group[name] for name in names}, "clip_grad": engine.clip_grad}))
        return original(engine, topology, given, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", watched)
    train(config(root, run, base, **changes))
    monkeypatch.setattr(loop, "train_step", original)
    return seen


def numbers(run: Path, first: int = DONE) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run)[first:]]


def weights(run: Path) -> str:
    from megafuse.converters.digest import weights_digest

    return weights_digest(run / "checkpoints" / step_name(complete_steps(run / "checkpoints")[-1]))


def test_unchanged_it_is_the_whole_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loss in LOSSES:
        assert len(go_on(inputs, tmp_path / loss, loss, {}, monkeypatch)) == 2
        whole = inputs / f"{loss}-whole"
        assert numbers(tmp_path / loss) == numbers(whole) and weights(tmp_path / loss) == weights(whole)


OPTIM: dict[str, dict[str, Any]] = {
    "optim.lr": {"lr": 4e-3},
    "optim.min_lr": {"min_lr": 5e-4},
    "optim.schedule": {"schedule": "cosine"},
    "optim.warmup_ratio": {"warmup_ratio": 0.75},
    "optim.weight_decay": {"weight_decay": 0.5},
    "optim.beta1": {"beta1": 0.5},
    "optim.beta2": {"beta2": 0.9},
    "optim.eps": {"eps": 1e-2},
    "optim.clip_grad": {"clip_grad": 1e-3},
    "epochs": {"epochs": 2},
    "max_steps": {"max_steps": 3},
}


@pytest.mark.parametrize("field", OPTIM)
def test_optimizer_and_schedule(inputs: Path, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"optim": OPTIM[field]} if field.startswith("optim.") else OPTIM[field]
    seen = go_on(inputs, tmp_path / "run", "sft", {**changed, "allow_change": (field,)}, monkeypatch)
    asked = config(inputs, tmp_path / "run", "sft", **changed)
    total = min(4 * asked.epochs, asked.max_steps or 99)
    assert len(seen) == total - DONE
    for update, (_, found) in enumerate(seen, DONE):
        assert found.pop("lr") == pytest.approx(rate(update, total, asked.optim), rel=1e-12, abs=0)
        optim = asked.optim
        assert found == {"weight_decay": optim.weight_decay, "betas": (optim.beta1, optim.beta2), "eps": optim.eps,
                         "clip_grad": optim.clip_grad}  # fmt: skip
    assert [r["lr"] for r in read_metrics(tmp_path / "run")[DONE:]] == pytest.approx(
        [rate(update, total, asked.optim) for update in range(DONE, total)], rel=1e-12, abs=0
    )
    assert weights(tmp_path / "run") != weights(inputs / "sft-whole")


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimizer_takes_all_of_them(
    inputs: Path, tmp_path: Path, distributed: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, sharding = {"model": {"precision": precision}}, {"distributed": distributed}
    train(config(inputs, tmp_path / "half" / "sft-half", "sft", **here, optim=sharding, max_steps=2))
    shutil.copytree(inputs / "sft", tmp_path / "half" / "sft")
    (tmp_path / "half" / "model").symlink_to(inputs / "model")
    optim = {name: value for field in OPTIM if field.startswith("optim.") for name, value in OPTIM[field].items()}
    moved = ("model.path", "data.dataset")
    changes = {"optim": {**optim, "distributed": distributed}, "allow_change": (*OPTIM, *moved), **here}
    seen = go_on(tmp_path / "half", tmp_path / "run", "sft", changes, monkeypatch)
    asked = config(inputs, tmp_path / "run", "sft", **changes).optim
    for update, (_, found) in enumerate(seen, DONE):
        assert found == {"lr": pytest.approx(rate(update, 4, asked), rel=1e-12, abs=0), "weight_decay": 0.5,
                         "betas": (0.5, 0.9), "eps": 1e-2, "clip_grad": 1e-3}  # fmt: skip
    assert len(seen) == 2


def test_a_warm_up_that_is_taken_away(inputs: Path, tmp_path: Path) -> None:
    """The schedule with one is a unit ahead of the updates, without one it is not."""
    first = config(inputs, tmp_path / "run", "sft", optim={"warmup_ratio": 0.5}, max_steps=2)
    train(first)
    longer = {"optim": {"warmup_ratio": 0.0}, "allow_change": ("optim.warmup_ratio", "max_steps"), "max_steps": None}
    asked = config(inputs, tmp_path / "run", "sft", **longer)
    train(asked)
    found = [record["lr"] for record in read_metrics(tmp_path / "run")]
    wanted = [rate(0, 2, first.optim), rate(1, 2, first.optim), rate(2, 4, asked.optim), rate(3, 4, asked.optim)]
    assert found == pytest.approx(wanted, rel=1e-12, abs=0)


LOSS: dict[str, tuple[str, dict[str, Any]]] = {
    "loss.name": ("dpo", {"name": "ln_dpo"}),
    "loss.gamma": ("dpo", {"name": "simpo", "gamma": 0.5}),
    "loss.beta": ("dpo", {"beta": 3.0}),
    "loss.label_smoothing": ("dpo", {"label_smoothing": 0.3}),
    "loss.reduction": ("sft", {"reduction": "token_mean"}),
    "loss.beta_kl": ("rloo", {"beta_kl": 5.0}),
    "loss.surrogate": ("rloo", {"surrogate": "reinforce", "clip": None}),
    "loss.clip": ("rloo", {"clip": 1e-6}),
    "loss.alpha_max": ("wrpo", {"alpha_max": 0.9}),
}


@pytest.mark.parametrize("field", LOSS)
def test_loss(inputs: Path, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, changed = LOSS[field]
    changes = {"loss": LOSSES[base][1] | changed, "allow_change": tuple(f"loss.{name}" for name in changed)}
    seen = go_on(inputs, tmp_path / "run", base, changes, monkeypatch)
    assert [given for given, _ in seen] == [make_loss(config(inputs, tmp_path / "run", base, **changes).loss)] * 2
    for found, before in zip(numbers(tmp_path / "run"), numbers(inputs / f"{base}-whole")):
        assert found != before
    assert weights(tmp_path / "run") != weights(inputs / f"{base}-whole")


def shifted_reference(root: Path, folder: Path) -> Path:
    """The run's own reference log-probs, each better by a nat: a cache with the same key."""
    shutil.copytree(root / "dpo-half" / "reference", folder)
    for path in folder.glob("*.npz"):
        part = dict(np.load(path))
        np.savez(path, logps=part["logps"] + np.arange(len(part["logps"])) % 2, lengths=part["lengths"])
    return folder


REFERENCES = ("reference.path", "reference.model")


def test_reference(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numbers(inputs / "dpo-whole")
    path = {"path": shifted_reference(inputs, tmp_path / "cache")}
    go_on(inputs, tmp_path / "run", "dpo", {"reference": path, "allow_change": ("reference.path",)}, monkeypatch)
    assert all(a != b for a, b in zip(numbers(tmp_path / "run"), whole, strict=True))

    changes = {"reference": {"model": inputs / "other"}, "allow_change": ("reference.model",)}
    with pytest.raises(IntegrityError, match=r"weights: .*\n.*remove .*reference to have it computed again"):
        go_on(inputs, tmp_path / "model", "dpo", changes, monkeypatch)
    before = (inputs / "dpo-half" / CONFIG_FILE).read_bytes()
    assert (tmp_path / "model" / CONFIG_FILE).read_bytes() == before
    shutil.rmtree(tmp_path / "model" / "reference")
    train(config(inputs, tmp_path / "model", "dpo", **changes))
    assert all(a != b for a, b in zip(numbers(tmp_path / "model"), whole, strict=True))


def test_held_out(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"held_out": {"dataset": inputs / "held_out"}, "allow_change": ("held_out.dataset",)}
    go_on(inputs, tmp_path / "run", "sft", changes, monkeypatch)
    assert "held_out/loss" in read_metrics(tmp_path / "run")[-1]
    assert numbers(tmp_path / "run") == numbers(inputs / "sft-whole")


def test_held_out_log_probs_of_other_prompts_are_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("one", 5), ("two", 6)):
        write_held_out(tmp_path / name, "pair", seed)
    allowed = ("held_out.dataset", "max_steps")
    one = {"held_out": {"dataset": tmp_path / "one"}, "max_steps": 3, "allow_change": allowed}
    go_on(inputs, tmp_path / "run", "dpo", one, monkeypatch)
    two = config(inputs, tmp_path / "run", "dpo", held_out={"dataset": tmp_path / "two"}, allow_change=allowed)
    with pytest.raises(
        IntegrityError, match=r"data: the data set .*\n.*remove .*held_out_reference to have it computed"
    ):
        train(two)
    shutil.rmtree(tmp_path / "run" / "held_out_reference")
    train(two)
    # that of step 2 is made up for: its checkpoint had none yet
    assert [("held_out/loss" in record) for record in read_metrics(tmp_path / "run")] == [False, True, True, True]


REFUSED: dict[str, dict[str, Any]] = {
    "model.path": {"model": {"path": "other"}},
    "model.precision": {"model": {"precision": "bf16"}},
    "data.dataset": {"data": {"dataset": "held_out"}},
    "global_batch_size": {"global_batch_size": 2},
    "seed": {"seed": 5},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_steps_done_do_not_allow_is_refused(
    inputs: Path, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**REFUSED[field], "allow_change": (field,)}
    if field in ("model.path", "data.dataset"):
        section, name = field.split(".")
        changes[section] = {name: inputs / changes[section][name]}
    with pytest.raises(ConfigError) as caught:
        go_on(inputs, tmp_path / "run", "sft", changes, monkeypatch)
    told = str(caught.value)
    assert "has done 2 steps" in told and f"  {field}: began with" in told and BOUND[field] in told
    assert "or begin in another run_dir with model.path = the newest checkpoint" in told
    for file in (CONFIG_FILE, "metrics.jsonl"):  # nothing was bound, nothing computed
        assert (tmp_path / "run" / file).read_bytes() == (inputs / "sft-half" / file).read_bytes()


@pytest.mark.parametrize("leave", [True, False])
def test_a_model_and_data_that_have_moved_are_let_through(inputs: Path, tmp_path: Path, leave: bool) -> None:
    shutil.copytree(inputs / "model", tmp_path / "old_model")
    shutil.copytree(inputs / "sft", tmp_path / "old_data")
    old = {"model": {"path": tmp_path / "old_model"}, "data": {"dataset": tmp_path / "old_data"}}
    train(config(inputs, tmp_path / "run", "sft", **old, max_steps=2))
    if not leave:
        shutil.rmtree(tmp_path / "old_model")
        shutil.rmtree(tmp_path / "old_data")
    fields = ("model.path", "data.dataset", "max_steps")
    train(config(inputs, tmp_path / "run", "sft", max_steps=3, allow_change=fields))
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2, 3]


def test_without_a_step_done_everything_may_change(inputs: Path, tmp_path: Path) -> None:
    """As a run that was stopped before its first checkpoint."""
    train(config(inputs, tmp_path / "run", "sft"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    changes = {"seed": 5, "global_batch_size": 8, "model": {"path": inputs / "other"}}
    fields = ("seed", "global_batch_size", "model.path")
    run_distributed(run_trainings, 1, [config(inputs, tmp_path / "run", "sft", **changes, allow_change=fields)])
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2] and len(read_metrics(tmp_path / "run")) == 2


def test_a_last_checkpoint_without_optimizer_cannot_be_made_longer(inputs: Path, tmp_path: Path) -> None:
    weights_only = {"checkpoint": {"final_optimizer": False}}
    longer = {**weights_only, "epochs": 2, "allow_change": ("epochs",)}
    train(config(inputs, tmp_path / "run", "sft", **weights_only))
    before = (tmp_path / "run" / CONFIG_FILE).read_bytes()
    last = tmp_path / "run" / "checkpoints" / step_name(4)
    with pytest.raises(ConfigError, match=r"no optimizer state.*, or remove it, and the run goes on from step 2"):
        train(config(inputs, tmp_path / "run", "sft", **longer))
    assert (tmp_path / "run" / CONFIG_FILE).read_bytes() == before
    assert train(config(inputs, tmp_path / "run", "sft", **weights_only)) == last  # complete, as before
    shutil.rmtree(last)
    train(config(inputs, tmp_path / "run", "sft", **longer))
    asked = config(inputs, tmp_path / "run", "sft", **longer)
    rates = [record["lr"] for record in read_metrics(tmp_path / "run")[DONE:]]
    assert rates == pytest.approx([rate(update, 8, asked.optim) for update in range(DONE, 8)], rel=1e-12, abs=0)


def test_another_configuration_of_the_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Its config.json was exchanged between two starts: equal shapes, another rotary base."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    mine = {"model": {"path": tmp_path / "model"}}
    train(config(inputs, tmp_path / "run", "sft", **mine, max_steps=2))
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 500000.0'))
    longer = config(inputs, tmp_path / "run", "sft", **mine, allow_change=("max_steps",))
    with pytest.raises(ConfigError, match=r"another model than .*step_00000002.*rope_theta: 500000.0 and 10000.0"):
        train(longer)
