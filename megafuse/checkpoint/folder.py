"""Checkpoint folders of a run: complete or absent, newest found again, old ones pruned.

`step_00000010.tmp` is being written; the rename to `step_00000010` comes after its manifest and everything in it has
reached the disk, so a folder without `.tmp` is a complete checkpoint. Nothing else has to be trusted.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from megafuse.errors import IntegrityError
from megafuse.observe.manifest import read_manifest_of, sync_path, utc_now, versions, write_json_atomic

FORMAT = "megafuse-checkpoint/1"
_STEP = re.compile(r"step_(\d{8})")


def step_name(step: int) -> str:
    """Folder name of a checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, ascending."""
    names = [p.name for p in root.iterdir()] if root.is_dir() else []
    steps = [int(m[1]) for name in names if (m := _STEP.fullmatch(name))]
    return sorted(step for step in steps if (root / step_name(step) / "manifest.json").is_file())


def begin(root: Path, step: int) -> Path:
    """A fresh folder to write checkpoint `step` into. Leftovers of killed saves are removed. One process only."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover)
    folder = root / (step_name(step) + ".tmp")
    folder.mkdir()
    return folder


def commit(folder: Path, hf_source: Path, facts: dict[str, Any], *, keep: int) -> Path:
    """Finish a written `folder`: HF side files, manifest, fsync, rename, prune to the `keep` newest. One process only.

    hf_source: the checkpoint or Hugging Face folder that training started from; what is not weights there (config,
    tokenizer, shard layout) rides along as `hf/`, so that the new checkpoint can be exported by itself. Returns the
    final folder.
    """
    if (hf_source / "hf").is_dir():
        shutil.copytree(hf_source / "hf", folder / "hf")
    else:
        from megafuse.converters.importer import keep_side_files

        keep_side_files(hf_source, folder / "hf")
    files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size} for p in _files(folder)}
    write_json_atomic(
        folder / "manifest.json",
        {"format": FORMAT, "created": utc_now(), **facts, "versions": versions(), "files": files},
    )
    for path in [*_files(folder), folder / "hf", folder]:
        sync_path(path)
    final = folder.with_suffix("")
    os.rename(folder, final)
    sync_path(final.parent)
    for step in complete_steps(final.parent)[:-keep]:
        shutil.rmtree(final.parent / step_name(step))
    return final


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a checkpoint, its files checked for presence and size.

    Raises:
        IntegrityError: naming the file that is missing, unreadable, or of another size.
    """
    manifest = read_manifest_of(folder, FORMAT)
    for name, known in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != known["bytes"]:
            raise IntegrityError(f"{file} has {size} bytes, its manifest says {known['bytes']}; restore the checkpoint")
    return manifest


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())
