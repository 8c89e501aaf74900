"""What a start of a run is refused for before anything is computed or bound: two models, two starts."""

from pathlib import Path
from typing import Any

from megafuse.checkpoint.folder import read_manifest
from megafuse.config.train import TrainConfig
from megafuse.converters.digest import weights_digest
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError
from megafuse.model.arch import ModelArch, read_arch, told_differences
from megafuse.reference.cache import has_architecture

REFERENCE, HELD_OUT = "reference", "held_out_reference"
"""Folders of a run with the reference log-probs that it computes itself: of its data, of its held-out data."""


def refuse_other_architecture(config: TrainConfig, arch: ModelArch, *, needs_reference: bool) -> None:
    """Refuse to compute log-probs of a reference of another architecture than `arch`, the policy's.

    A run has one model, and the reference's weights are loaded into it: of another size they would not fit, under
    another rope or epsilon they would be another model.

    Raises:
        ConfigError: naming both models, what differs between them, and the command that computes the log-probs.
    """
    source = config.reference.model
    if not needs_reference or source is None or not (differ := arch.differing(read_arch(source))):
        return
    wanted = {REFERENCE: config.data.dataset if config.reference.path is None else None}
    wanted[HELD_OUT] = config.held_out.dataset
    for name, dataset in wanted.items():
        folder = config.run_dir / name
        if dataset is None or has_architecture(folder):  # `megafuse reference` may have put them there
            continue
        out = "REFERENCE" if name == REFERENCE else str(folder)
        then = f"and give reference.path = {out}" if name == REFERENCE else "before the run: it finds them there"
        precision = "" if config.model.precision == "auto" else f" --model.precision {config.model.precision}"
        raise ConfigError(
            f"reference.model = {source} is another model than model.path = {config.model.path} "
            f"({told_differences({key: (other, own) for key, (own, other) in differ.items()})}), and a run computes "
            f"log-probs with its own only; compute those of {dataset} with `megafuse reference --model.path {source}"
            f"{precision} --data.dataset {dataset} --out {out}`, {then}, beside the same reference.model"
        )


def same_content(newest: Path, field: str, began: Any, now: Any) -> bool:
    """Whether the folder `now` of `field` is another place of what the run with the checkpoint `newest` began with.

    Of a model that is gone from where it was, the architecture is compared alone: the run takes no weights from it.
    """
    if field == "data.dataset":
        position = read_manifest(newest).get("data_position", {})
        return bool(GroupDataset(now).manifest["digest"]["data"] == position.get("data"))
    if field == "model.path" and not read_arch(newest).differing(read_arch(now)):
        return not Path(began).is_dir() or weights_digest(began) == weights_digest(now)
    return False
