"""A sweep: its points, each a job in a folder of its own, named by its settings; and how far each has come."""

import hashlib
import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafuse.config.launch import KIND_OF_LOSS, SweepConfig, loss_fields
from megafuse.errors import ConfigError
from megafuse.launch.job import Job, make_job, pairs, words
from megafuse.launch.recipes import read_recipe, repository
from megafuse.observe.manifest import read_json, write_json_atomic

POINT = "point.json"
"""In a point's folder: what it was begun with."""
STARTED = "launch.json"
"""In a point's folder: the last start, its job and what became of it."""
_RANK_FIELDS = (
    "seed", "domains", "reward_field", "on_bad_record", "on_bad_response", "on_unfinished", "max_length",
    "max_prompt_length", "on_long_response", "chat_template", "thinking", "system_messages",
    "end_of_turn", "vocab_size",
)  # fmt: skip
"""Fields of `build` that decide which prompts are held out and how they are tokenised, whatever is trained on."""


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""

    name: str
    settings: dict[str, Any]
    """Axis -> value, of the axes that the grid has."""
    job: Job
    shares: dict[str, tuple[str, ...]]
    """Folder of the run -> what decides its content: points that agree can share it."""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.job.run)

    @property
    def done(self) -> bool:
        """Whether its last output is there."""
        last = "eval/accuracy.json" if self.job.env["RANK_BUILD"] else "hf/config.json"
        return (self.folder / last).is_file()


def points_of(config: SweepConfig) -> list[Point]:
    """Every point, in the order of the axes; the last axis varies first.

    Raises:
        ConfigError: the recipe is unknown, or a value cannot stand in the recipe's BUILD variable.
    """
    if config.host is not None:
        raise ConfigError("host: a sweep reads its run folders; start it on the login node itself")
    axes = {name: values for name, values in config.grid if values}
    combinations = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [_point(config, settings) for settings in combinations]


def point_name(settings: dict[str, Any]) -> str:
    """`alpha-0.005_loss-simpo`: a folder's and a job's name."""
    texts = [f"{axis}-{'+'.join(v) or 'all' if isinstance(v, tuple) else v}" for axis, v in settings.items()]
    name = re.sub(r"[^A-Za-z0-9.+_-]", "-", "_".join(texts)) or "point"
    return name if len(name) <= 120 else f"{name[:107]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _point(config: SweepConfig, settings: dict[str, Any]) -> Point:
    recipe = read_recipe(repository(), config.recipe)
    target = config.targets[settings["target"]] if "target" in settings else None
    model = target.model if target else str(config.model)
    build, train, chosen = dict(config.build), dict(config.train), {}
    if settings.get("sources"):
        build["include_sources"] = settings["sources"]
    build |= {axis: settings[axis] for axis in ("alpha", "k") if axis in settings}
    if "loss" in settings:
        loss = config.loss(settings["loss"])
        train |= {f"loss.{field}": value for field, value in loss_fields(loss).items()}
        build["kind"] = KIND_OF_LOSS.get(loss.name, "pair")
        chosen = {"LOSS": loss.name} | ({"BETA": str(loss.beta)} if loss.beta is not None else {})
    rank = {field: config.build[field] for field in _RANK_FIELDS if field in config.build}
    if config.holdout:
        build["holdout"] = rank["holdout"] = config.holdout
    train |= target.settings if target else {}
    name = point_name(settings)
    env = {
        **pairs(config.env),
        **(target.env if target else {}),
        **chosen,
        "MODEL": model,
        "DATA": " ".join(config.data),
        "RUN": os.path.join(config.run, name),
        "RECIPE": str(recipe.script),
        "BUILD": _split_by_shell(words(build)),
        "RANK_BUILD": _split_by_shell(words(rank)) if config.holdout else "",
        "RANK_MODEL": _split_by_shell(words({k: v for k, v in train.items() if k.startswith("model.")})),
    }
    job = make_job(config, recipe, env, words(train), name=name)
    job = replace(job, script=os.path.join(job.root, "launch", "point.sh"))
    data = (env["MODEL"], env["DATA"], env["BUILD"])
    return Point(name, settings, job, {"dataset": data, "model": data[:1], "reference": data})


def _split_by_shell(flags: Sequence[str]) -> str:
    """One text that the scripts split at spaces again."""
    if bad := [word for word in flags if re.search(r"[\s*?\[\]]", word) or not word]:
        raise ConfigError(f"the value {bad[0]!r} has a space or a wildcard, which the recipe's BUILD cannot hold")
    return " ".join(flags)


def begin(point: Point, others: Sequence[Point]) -> None:
    """Make the point's folder: its settings are written down, and what another point has finished is linked.

    Raises:
        ConfigError: the folder was begun with other settings; names the first that differs.
    """
    facts = {**{name: point.job.env[name] for name in ("MODEL", "DATA", "BUILD", "RANK_BUILD", "RECIPE")},
             "arguments": list(point.job.arguments)}  # fmt: skip
    file = point.folder / POINT
    if file.exists():
        before = read_json(file)
        for name, value in facts.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{point.folder} was begun with {name} = {before.get(name)!r}, and is now asked for {value!r}: "
                    "set another run, or remove the folder"
                )
    point.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, facts)
    for name, key in point.shares.items():
        for other in others:
            source = other.folder / name
            if other.name == point.name or other.shares[name] != key or (point.folder / name).exists():
                continue
            if (source / "manifest.json").is_file() and _whole(source) and not source.is_symlink():
                (point.folder / name).symlink_to(os.path.relpath(source, point.folder), target_is_directory=True)


def _whole(folder: Path) -> bool:
    """A reference cache grows in place, and says when it is complete; the others appear whole."""
    return folder.name != "reference" or read_json(folder / "manifest.json").get("complete") is True


def remember(point: Point, state: str, job: str) -> None:
    """Write down the last start."""
    write_json_atomic(point.folder / STARTED, {"state": state, "job": job})


def last_start(folder: Path) -> dict[str, str]:
    """The last start of a point; empty where there was none."""
    file = folder / STARTED
    return dict(read_json(file)) if file.exists() else {}


def queued(job: str) -> str:
    """State of a Slurm job that waits or runs; empty where there is none."""
    if not job:
        return ""
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""
