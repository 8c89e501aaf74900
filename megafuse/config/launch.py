"""What is launched, and where: `megafuse launch` and `megafuse launch sweep`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, ValidationError, model_validator

from megafuse.config.base import Config
from megafuse.config.build import Kind
from megafuse.config.loss import DEFAULTS, REQUIRED, LossConfig

KIND_OF_LOSS: dict[str, Kind] = {"sft": "sft", "rloo": "rloo", "wrpo": "wrpo"}
"""Kind of data set that a loss trains on; `pair` for every other loss."""


class WhereConfig(Config):
    """Where a job runs, and with what. Unset: what the recipe's own #SBATCH lines and variables say."""

    on: Literal["slurm", "local"] = "slurm"
    """slurm: submit. local: run here, one job after another, every stage on this machine's GPUs (or CPU)."""
    via: Literal["nemo-run", "plain"] = "nemo-run"
    """nemo-run: SlurmExecutor and LocalExecutor of NeMo-Run (extra `launch`). plain: sbatch and bash themselves."""
    dry_run: bool = False
    """Print the batch script or the command, and stop: nothing is written, submitted or run."""
    follow: bool = False
    """slurm: wait for the end; the exit status is then the job's. local always does."""

    nodes: int | None = Field(None, ge=1)
    """slurm: number of nodes."""
    gpus_per_node: int | None = Field(None, ge=1)
    """slurm: GPUs of each node. local: processes; None: the GPUs of this machine, or 1."""
    time: str | None = None
    """slurm: time limit, in sbatch's form (4:00:00). None: the partition's."""
    partition: str | None = None
    """slurm: partition. None: the cluster's default."""
    account: str | None = None
    """slurm: account. None: yours."""
    sbatch: tuple[str, ...] = ()
    """slurm: further options of sbatch without their dashes, OPTION=VALUE or OPTION: qos=high exclude=node7."""
    container: str | None = None
    """slurm: image that every stage runs in (pyxis): IMAGE. None: what is installed on the nodes."""
    container_mounts: tuple[str, ...] = ()
    """SOURCE:TARGET of folders that the container sees, besides the repository and the run folder: MOUNTS."""
    env: tuple[str, ...] = ()
    """Variables of the recipe, NAME=VALUE: TP=2 HEALTH=off. `megafuse launch RECIPE --dry_run` lists them."""
    setup: str = ""
    """Shell line before the recipe, where jobs need it: "source .venv/bin/activate"."""

    host: str | None = None
    """slurm: USER@LOGIN_NODE to submit through SSH, with NeMo-Run. None: this machine submits itself."""
    identity: Path | None = None
    """Private key for `host`. None: SSH's own way, then a password."""
    remote_root: str | None = None
    """The repository's folder on `host`."""

    @model_validator(mode="after")
    def _where_fits(self) -> "WhereConfig":
        if (self.host is None) != (self.remote_root is None):
            raise ValueError("host and remote_root belong together: the login node, and the repository's folder there")
        if self.host is not None and (self.on, self.via) != ("slurm", "nemo-run"):
            raise ValueError(f"host = {self.host!r} needs on = 'slurm' and via = 'nemo-run'")
        if self.host is not None and self.host.count("@") != 1:
            raise ValueError(f"host = {self.host!r} must be USER@LOGIN_NODE")
        if self.container is not None and self.on == "local":
            raise ValueError("container is for on = 'slurm'; start this command inside the container instead")
        if self.container_mounts and self.container is None:
            raise ValueError("container_mounts needs container")
        if bad := [text for text in self.env if not text.partition("=")[0].isidentifier() or "=" not in text]:
            raise ValueError(f"env: {bad[0]!r} is not NAME=VALUE")
        return self


class LaunchConfig(WhereConfig):
    """One job of one recipe."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """A script of slurm/ by its name, fusepo_llama8b for slurm/fusepo_llama8b.sh, or a path."""
    model: str | None = None
    """Hugging Face folder of the target model: MODEL. None: the environment's."""
    data: tuple[str, ...] = ()
    """Scored answers, wildcards allowed: DATA. None: the environment's."""
    run: str | None = None
    """Run folder: RUN. None: the environment's, or runs/JOBNAME in the repository."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Fields of the recipe's last command (`megafuse train`), FIELD=VALUE or FLAG: optim.lr=8e-7 loss.name=simpo."""


class GridConfig(Config):
    """The axes of a sweep: every combination is a point. An axis that is left out stays as the recipe has it."""

    sources: tuple[tuple[str, ...], ...] = ()
    """Sets of sources; an empty set stands for all."""
    alpha: tuple[float, ...] = ()
    """Temperatures of the weights, in units of the reward."""
    k: tuple[int, ...] = ()
    """Responses (SFT) or sources (pairs) kept a prompt."""
    loss: tuple[str, ...] = ()
    """Losses: names of [losses.NAME], or of a loss that needs no such table."""
    target: tuple[str, ...] = ()
    """Target models: names of [targets.NAME]."""

    @model_validator(mode="after")
    def _distinct(self) -> "GridConfig":
        for axis, values in self:
            if len(set(values)) < len(values):
                raise ValueError(f"grid.{axis} = {list(values)!r} names a value twice")
        if bad := [value for value in self.alpha if not value > 0]:
            raise ValueError(f"grid.alpha = {bad[0]!r} must be above 0")
        if bad_k := [value for value in self.k if value < 1]:
            raise ValueError(f"grid.k = {bad_k[0]!r} must be at least 1")
        return self


class TargetConfig(Config):
    """A target model of a sweep."""

    model: str
    """Its Hugging Face folder."""
    env: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults
    """Variables of the recipe for this target: { TP = "4" }."""
    settings: dict[str, Any] = {}  # noqa: RUF012
    """Fields of `megafuse train` for this target: { "optim.lr" = 8e-7 }."""


class SweepConfig(WhereConfig):
    """Many jobs of one recipe, and one table. Usually a TOML file, see examples/sweep.toml."""

    recipe: str
    """A script of slurm/ by its name, or a path. It must leave its training run in RUN/train."""
    run: str
    """Folder of the sweep: a folder a point, summary.md, summary.csv, summary.json."""
    data: tuple[str, ...] = Field(min_length=1)
    """Scored answers, wildcards allowed."""
    model: str | None = None
    """Hugging Face folder of the target model, where grid.target is empty."""
    grid: GridConfig = GridConfig()
    losses: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    """[losses.NAME]: fields of a loss; `name` where NAME is not the loss's own (ln_dpo twice, with two betas)."""
    targets: dict[str, TargetConfig] = {}  # noqa: RUF012
    """[targets.NAME]: the models of grid.target."""
    build: dict[str, Any] = {}  # noqa: RUF012
    """Fields of `megafuse build` for every point: max_prompts = 20000."""
    train: dict[str, Any] = {}  # noqa: RUF012
    """Fields of `megafuse train` for every point, dotted: "optim.lr" = 8e-7."""
    holdout: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts that no point trains on; rank accuracy is measured there, over all sources. 0: not."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "SweepConfig":
        if (self.model is None) == (not self.grid.target):
            raise ValueError("set model, or grid.target with a table [targets.NAME] for each; not both")
        if unknown := [name for name in self.grid.target if name not in self.targets]:
            raise ValueError(f"grid.target names {unknown[0]!r}; there is no table [targets.{unknown[0]}]")
        for name in self.grid.loss:
            self.loss(name)
        taken = {"alpha", "k", "kind", "holdout", "include_sources", "inputs", "output", "tokenizer"} & set(self.build)
        if taken:
            raise ValueError(f"build.{sorted(taken)[0]} is set by the sweep itself: use grid, holdout, data or losses")
        return self

    def loss(self, name: str) -> LossConfig:
        """The loss that a name of `grid.loss` stands for.

        Raises:
            ValueError: there is no such loss, or its table does not fit it.
        """
        table = self.losses.get(name, {})
        kind = table.get("name", name)
        if kind not in REQUIRED:
            raise ValueError(f"grid.loss names {name!r}: no loss, and no [losses.{name}] with a name; there are "
                             f"{', '.join(REQUIRED)}")  # fmt: skip
        unknown = set(table) - set(LossConfig.model_fields)
        if unknown:
            raise ValueError(f"losses.{name}.{sorted(unknown)[0]} is not a field of a loss")
        try:
            return LossConfig.model_validate({**table, "name": kind})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, ("losses", name, *problem["loc"])))
            raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None


def loss_fields(loss: LossConfig) -> dict[str, Any]:
    """Every field of `loss.*`, None where this loss does not use it: a preset's value must not stay behind."""
    used = {*REQUIRED[loss.name], *DEFAULTS[loss.name]}
    return {name: getattr(loss, name) for name in LossConfig.model_fields if name in used or name != "clip"}
