"""One job: a recipe with its variables, arguments and options of sbatch, and the batch script that runs it."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megafuse.config.launch import LaunchConfig, WhereConfig
from megafuse.errors import ConfigError
from megafuse.launch.recipes import Recipe, read_recipe, repository


@dataclass(frozen=True)
class Job:
    """What is submitted, or run here."""

    name: str
    script: str
    """The batch script, as the machine that runs it names it."""
    root: str
    """The repository there."""
    run: str
    """Run folder there."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of the recipe; everything else is inherited."""
    arguments: tuple[str, ...] = ()
    options: dict[str, str | None] = field(default_factory=dict)
    """Options of sbatch: the recipe's own lines, with this launch's changes. None: a flag."""
    setup: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    """Variables that the recipe knows, for whoever reads the dry run."""

    @property
    def body(self) -> str:
        """The shell lines of the job. `exec`: the recipe becomes the batch script itself, so that it hears Slurm's
        signals, requeues its job, and its exit code is the job's."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.env.items()]
        lines += [f"cd {shlex.quote(self.root)}"]
        lines += [self.setup] if self.setup else []
        return "\n".join([*lines, f"exec bash {shlex.join([self.script, *self.arguments])}"])

    @property
    def batch_script(self) -> str:
        """The whole as a file for sbatch."""
        header = [f"#SBATCH --{name}" + (f"={value}" if value is not None else "") for name, value in
                  self.options.items()]  # fmt: skip
        return "\n".join(["#!/bin/bash", *header, "set -eu", self.body]) + "\n"

    @property
    def by_hand(self) -> str:
        """The same as one line at a prompt in the repository."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items() if name != "MEGAFUSE_ROOT"]
        options = [f"--{name}" + (f"={shlex.quote(value)}" if value is not None else "") for name, value in
                   self.options.items()]  # fmt: skip
        return " ".join([*variables, "sbatch", *options, shlex.join([self.script, *self.arguments])])


def root_of(config: WhereConfig) -> str:
    """The repository where the job will run."""
    return config.remote_root or str(repository())


def job_of(config: LaunchConfig) -> Job:
    """The job that `megafuse launch` was asked for.

    Raises:
        ConfigError: no such recipe, a misspelled variable, or one that it requires is set neither here nor in the
            environment.
    """
    recipe = read_recipe(repository(), config.recipe)
    recipe.refuse_misspelled(pairs(config.env))
    given = {
        "MODEL": config.model,
        "DATA": " ".join(config.data) or None,
        "RUN": config.run or os.environ.get("RUN") or f"runs/{recipe.job_name}",
        **pairs(config.env),
    }
    return make_job(config, recipe, {k: v for k, v in given.items() if v is not None}, words(config.settings))


def make_job(
    config: WhereConfig, recipe: Recipe, env: dict[str, str], arguments: Sequence[str], *, name: str | None = None
) -> Job:
    """The job of a recipe with these variables and arguments, where `config` says.

    Raises:
        ConfigError: a required variable is missing, or the scripts know no container.
    """
    root = root_of(config)
    env = {"MEGAFUSE_ROOT": root, **env, "RUN": os.path.join(root, env["RUN"])}
    missing = [v for v in recipe.required if v not in env and (config.host is not None or not os.environ.get(v))]
    if missing:
        flags = " and ".join(f"--{v.lower()}" if v in ("MODEL", "DATA") else f"--env {v}=..." for v in missing)
        raise ConfigError(f"recipe {recipe.name} needs {', '.join(missing)}: set {flags}")
    if config.container is not None:
        _needs_containers(recipe.script.parent)
        env["IMAGE"] = config.container
        if config.container_mounts:
            env["MOUNTS"] = ",".join(config.container_mounts)
    if config.on == "local" and config.gpus_per_node:
        env.setdefault("NPROC", str(config.gpus_per_node))
    script = os.path.join(root, os.path.relpath(recipe.script, repository()))
    options = _options(config, recipe, name or recipe.job_name, env["RUN"])
    return Job(
        name or recipe.job_name, script, root, env["RUN"], env, tuple(arguments), options, config.setup,
        recipe.variables,
    )  # fmt: skip


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a dict."""
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def words(settings: Sequence[str] | dict[str, Any]) -> list[str]:
    """FIELD=VALUE texts, or fields and values, as flags of a `megafuse` command; True is a flag, None is None."""
    if not isinstance(settings, dict):
        settings = {k: shlex.split(v) if eq else True for k, eq, v in (text.partition("=") for text in settings)}
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            head, _, tail = name.rpartition(".")
            flags.append(f"--{head + '.' if head else ''}{'' if value else 'no_'}{tail}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags


def _options(config: WhereConfig, recipe: Recipe, name: str, run: str) -> dict[str, str | None]:
    changed = {
        "nodes": config.nodes,
        "gres": config.gpus_per_node and f"gpu:{config.gpus_per_node}",
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
    }
    options = {**recipe.options, "job-name": name}
    if config.host is None:  # sbatch does not make the folder, and there it cannot be made from here
        options["output"] = os.path.join(run, "%x-%j.out")
    options |= {option: str(value) for option, value in changed.items() if value is not None}
    return options | {k.lstrip("-"): v if eq else None for k, eq, v in (text.partition("=") for text in config.sbatch)}


def _needs_containers(scripts: Path) -> None:
    shared = scripts / "stages.sh"
    if not (shared.is_file() and "IMAGE" in shared.read_text()):
        raise ConfigError(f"container: the scripts in {scripts} start nothing in a container; leave it out")
