"""The checkpoints of one run: found and verified at its start, loaded, committed, pruned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megafuse.checkpoint import folder as folders
from megafuse.checkpoint.pickles import refuse_unknown_pickles
from megafuse.checkpoint.space import checkpoint_bytes, refuse_full_disk
from megafuse.checkpoint.state import load_model, load_run, model_state
from megafuse.checkpoint.verify import newest_trusted, verify
from megafuse.config.train import TrainConfig
from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch, read_arch, told_differences
from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine


@dataclass
class Keeper:
    """Every method is collective unless it says otherwise."""

    config: TrainConfig
    topology: Topology
    data_digest: str
    say: Callable[[str], None]
    _trusted: set[Path] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """Folder of the checkpoints."""
        return self.config.run_dir / "checkpoints"

    def newest(self) -> tuple[Path, int] | None:
        """The newest checkpoint that can be trusted, and its step; see `verify.newest_trusted`."""
        for leftover in self.topology.on_rank_zero(lambda: folders.remove_leftovers(self.root)):
            self.say(f"removed {leftover}, which a killed save left behind")
        found = newest_trusted(self.root, self.topology, strict=self.config.checkpoint.strict, say=self.say)
        if found is None:
            return None
        return found, int(self.topology.on_rank_zero(lambda: folders.read_manifest(found))["step"])

    def load_model(self, model: list[Any], folder: Path) -> None:
        """Weights of a Hugging Face folder, or of a checkpoint after it has been verified (once)."""
        if folder not in self._trusted:
            if self.topology.on_rank_zero(lambda: (folder / "manifest.json").is_file()):
                verify(folder, self.topology)
            elif self.topology.on_rank_zero(lambda: (folder / ".metadata").is_file()):  # megatron-core's own
                self.topology.on_rank_zero(lambda: refuse_unknown_pickles(folder))
            self._trusted.add(folder)
        load_model(model, self.topology, folder)

    def refuse_unfit(self, folder: Path, arch: ModelArch) -> None:
        """Raise ConfigError where a run of the model `arch` cannot go on from its verified checkpoint `folder`."""

        def look() -> None:
            manifest = folders.read_manifest(folder)
            if not manifest["optimizer"]:
                older = [step for step in folders.complete_steps(self.root) if step < manifest["step"]]
                raise ConfigError(
                    f"{folder} holds no optimizer state (checkpoint.final_optimizer = false), so this run cannot be "
                    "made longer; start a new run from it with model.path"
                    + (f", or remove it, and the run goes on from step {older[-1]}" if older else "")
                )
            if (folder / "hf" / "config.json").is_file() and (differ := arch.differing(read_arch(folder))):
                raise ConfigError(
                    f"model.path = {self.config.model.path} is another model than the one that {folder} was trained as "
                    f"({told_differences(differ)}); give the folder that the run began with, or begin in another "
                    "run_dir"
                )

        self.topology.on_rank_zero(look)

    def resume(self, engine: Engine, folder: Path) -> dict[str, Any]:
        """Bring `engine` to the state of a verified checkpoint of this run; returns its manifest."""
        manifest: dict[str, Any] = self.topology.on_rank_zero(lambda: folders.read_manifest(folder))
        load_run(engine, self.topology, folder, same_layout=manifest["layout"] == self._layout())
        self.say(f"resumed from {folder}")
        return manifest

    def preflight(self, engine: Engine, *, optimizer: bool = True) -> None:
        """Raise StorageError where there is no room for a checkpoint."""
        needed = checkpoint_bytes(model_state(engine.bare, self.topology), self.topology, optimizer=optimizer)
        self.topology.on_rank_zero(lambda: refuse_full_disk(self.root, needed))

    def facts(self, step: int, *, optimizer: bool) -> dict[str, Any]:
        """What the manifest of a checkpoint says about the run. Not collective."""
        config = self.config
        return {
            "step": step,
            "optimizer": optimizer,
            "layout": self._layout(),
            "data_position": {"step": step, "seed": config.seed, "data": self.data_digest},
        }

    def commit(self, folder: Path, facts: dict[str, Any], hashes: Mapping[str, str]) -> Path:
        """Finish the written `folder`; see `folder.commit`. Returns the final folder. One process only."""
        config = self.config.checkpoint
        return folders.commit(
            folder,
            self.config.model.path,
            facts,
            keep=config.keep,
            keep_every=config.keep_every,
            best_of=config.best_of,
            hashes=hashes,
        )

    def add_held_out(self, folder: Path, held_out: Mapping[str, Any]) -> None:
        """Complete the manifest of `folder` by its evaluation. One process only."""
        folders.add_held_out(folder, held_out)
        folders.point_to_best(self.root, self.config.checkpoint.best_of)

    def _layout(self) -> dict[str, Any]:
        """What has to be equal for the state of the random generators to mean the same."""
        return {**self.config.parallel.model_dump(), "world_size": self.topology.world_size}
