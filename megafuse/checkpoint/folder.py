"""Checkpoint folders of a run: complete or absent, newest found again, old ones pruned.

`step_00000010.tmp` is being written; the rename to `step_00000010` comes after its manifest, with the SHA-256 of every
file, and everything in it has reached the disk. So a folder without `.tmp` is a complete checkpoint; whether its bytes
are still those that were written is what `checkpoint.verify` looks at. LATEST and BEST are hints for people and other
tools: nothing here reads them. `step_00000010.damaged` failed verification and was set aside.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from megafuse.errors import IntegrityError
from megafuse.observe.manifest import (
    atomic_file,
    file_sha256,
    read_manifest_of,
    sync_path,
    utc_now,
    versions,
    write_json_atomic,
)

FORMAT = "megafuse-checkpoint/1"
LATEST = "LATEST"
BEST = "BEST"
_STEP = re.compile(r"step_(\d{8})")


def step_name(step: int) -> str:
    """Folder name of a checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, ascending."""
    names = [p.name for p in root.iterdir()] if root.is_dir() else []
    steps = [int(m[1]) for name in names if (m := _STEP.fullmatch(name))]
    return sorted(step for step in steps if (root / step_name(step) / "manifest.json").is_file())


def remove_leftovers(root: Path) -> list[Path]:
    """Remove what killed saves left under `root`; returns what it was. One process only."""
    leftovers = sorted(root.glob("*.tmp")) if root.is_dir() else []
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return leftovers


def begin(root: Path, step: int) -> Path:
    """A fresh folder to write checkpoint `step` into. One process only."""
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    folder = root / (step_name(step) + ".tmp")
    folder.mkdir()
    return folder


def commit(
    folder: Path,
    hf_source: Path,
    facts: dict[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    best_of: int = 1,
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Finish a written `folder`: HF side files, manifest, fsync, rename, LATEST, BEST, pruning. One process only.

    hf_source: the checkpoint or Hugging Face folder that training started from; what is not weights there (config,
    tokenizer, shard layout) rides along as `hf/`, so that the new checkpoint can be exported by itself.
    keep, keep_every, best_of: see `prune`.
    hashes: SHA-256 by file name of what the ranks wrote and put on disk; the rest is hashed here.
    Returns the final folder.
    """
    if (hf_source / "hf").is_dir():
        shutil.copytree(hf_source / "hf", folder / "hf")
    else:
        from megafuse.converters.importer import keep_side_files

        keep_side_files(hf_source, folder / "hf")
    files = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or file_sha256(path)}
    write_json_atomic(
        folder / "manifest.json",
        {"format": FORMAT, "created": utc_now(), **facts, "versions": versions(), "files": files},
    )
    for path in [*_files(folder), folder / "hf", folder]:
        sync_path(path)
    final = folder.with_suffix("")
    if final.exists():  # without a manifest, or it would have been found
        set_aside(final)
    os.rename(folder, final)
    sync_path(final.parent)
    with atomic_file(final.parent / LATEST) as file:
        file.write(f"{final.name}\n".encode())
    point_to_best(final.parent, best_of)
    prune(final.parent, keep=keep, keep_every=keep_every, best_of=best_of)
    return final


def scores(root: Path) -> dict[int, float]:
    """Held-out score by step, ascending, of the complete checkpoints that were evaluated; higher is better.

    Only those that compare with the newest: a run may have gone on with other prompts, or another loss.
    """
    found = {}
    for step in complete_steps(root):
        with contextlib.suppress(IntegrityError, KeyError, TypeError, ValueError):
            manifest = read_manifest_of(root / step_name(step), FORMAT)
            held_out, score = manifest["held_out"], float(manifest["held_out"]["score"])
            losses = [change for change in manifest.get("changes", []) if change["field"].startswith("loss.")]
            found[step] = score, (held_out.get("data"), losses)
    newest = found[max(found)][1] if found else None
    return {step: score for step, (score, of) in found.items() if of == newest}


def best_step(root: Path, best_of: int) -> int | None:
    """The one with the highest score of the last `best_of` checkpoints that were evaluated; the newer of two equal."""
    last = list(scores(root).items())[-best_of:]
    return max(last, key=lambda item: (item[1], item[0]))[0] if last else None


def point_to_best(root: Path, best_of: int) -> None:
    """Write the name of the best checkpoint into BEST. One process only."""
    best = best_step(root, best_of)
    if best is not None:
        with atomic_file(root / BEST) as file:
            file.write(f"{step_name(best)}\n".encode())


def add_held_out(folder: Path, held_out: Mapping[str, Any]) -> None:
    """Put the result of a late evaluation into the manifest of a complete checkpoint. One process only."""
    manifest = read_manifest_of(folder, FORMAT)
    write_json_atomic(folder / "manifest.json", {**manifest, "held_out": dict(held_out)})


def prune(root: Path, *, keep: int, keep_every: int, best_of: int = 1) -> None:
    """Remove complete checkpoints but the `keep` newest, those at multiples of `keep_every` steps (unless 0), and the
    best of the last `best_of` that were evaluated, with those that the next one is to be compared with."""
    spared = {best_step(root, best_of), *(list(scores(root))[1 - best_of :] if best_of > 1 else ())}
    for step in complete_steps(root)[:-keep]:
        if step not in spared and (not keep_every or step % keep_every):
            doomed = root / step_name(step)
            # first the name: a kill in the middle must not leave a folder that looks complete
            gone = doomed.with_suffix(".tmp")
            os.rename(doomed, gone)
            shutil.rmtree(gone)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint that failed verification, so that it is neither chosen again nor in the way."""
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            os.rename(folder, aside)
            return aside
    raise IntegrityError(f"{folder} was damaged a thousand times; look at the disk, and remove the .damaged folders")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a checkpoint, its files checked for presence and size.

    Raises:
        IntegrityError: the manifest is unreadable or names a file outside; or the file that is missing or of another
            size.
    """
    manifest = read_manifest_of(folder, FORMAT)
    try:
        sizes = {str(name): int(known["bytes"]) for name, known in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{folder / 'manifest.json'} is damaged ({error!r}); restore the checkpoint") from None
    for name, known in sizes.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise IntegrityError(f"{folder / 'manifest.json'} names {name!r}, outside its folder; do not trust it")
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != known:
            raise IntegrityError(f"{file} has {size} bytes, its manifest says {known}; restore the checkpoint")
    return manifest


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())
