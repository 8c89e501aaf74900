"""Model folders: the two kinds told apart and opened, outputs that are whole or absent, checkpoint manifests."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megafuse.converters.dcp_reader import DcpFolder, HfView
from megafuse.converters.hf_config import read_hf_config
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import SafetensorsFolder, has_weights
from megafuse.converters.views import TensorView
from megafuse.errors import ConfigError, IntegrityError, StorageError
from megafuse.observe.manifest import file_sha256, sync_path

FORMAT = "megafuse-checkpoint/1"
MANIFEST = "manifest.json"
SOURCES = ("model", "fp32-master")


def is_checkpoint(path: Path) -> bool:
    """A `torch_dist` checkpoint, as opposed to a Hugging Face folder."""
    return (path / ".metadata").is_file()


@contextlib.contextmanager
def open_weights(
    path: str | Path, *, source: str = "model", config: Path | None = None
) -> Iterator[tuple[Plan, TensorView]]:
    """The plan and the HF-named weights of a Hugging Face folder or a checkpoint, compared with its config.json.

    source: `model`, or `fp32-master` for a training checkpoint's master weights.
    config: the folder whose config.json counts for a checkpoint, instead of its own `hf/`.
    Raises ConfigError, UnsupportedModelError or IntegrityError where the folder is not what its configuration says.
    """
    folder = Path(path)
    if source not in SOURCES:
        raise ConfigError(f"source {source!r} is not one of {', '.join(SOURCES)}")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; fix: give a Hugging Face model folder or a checkpoint folder")
    if is_checkpoint(folder):
        if not config and not (folder / "hf" / "config.json").is_file():
            raise ConfigError(
                f"{folder} has no hf/config.json: megafuse did not write it; fix: copy what is no weights from the "
                "Hugging Face folder into hf/, or export with `--like HF_FOLDER`"
            )
        if config is None:
            _check_configuration(folder)
        plan = Plan(read_hf_config(config or folder / "hf"))
        with DcpFolder(folder, master=source == "fp32-master") as weights:
            yield plan, HfView(plan, weights)
        return
    if source != "model":
        raise ConfigError(f"source {source!r} needs a training checkpoint; {folder} is a Hugging Face folder")
    plan = Plan(read_hf_config(folder))
    with SafetensorsFolder(folder) as shards:
        plan.check(shards, where=str(folder))
        yield plan, shards


def _check_configuration(folder: Path) -> None:
    """Raises IntegrityError where a checkpoint's config.json is not the one that it was written with.

    Another rope base fits the weights as well, a smaller vocabulary looks like one that training has padded.
    """
    manifest = read_manifest(folder)
    known = manifest["files"].get("hf/config.json", {}).get("sha256") if manifest else None
    if known and known != file_sha256(folder / "hf" / "config.json"):
        raise IntegrityError(
            f"{folder}/hf/config.json is not the one that the checkpoint was written with; restore it. To change the "
            "configuration of a model, export it, and edit that of the exported folder"
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, its files checked for presence and size; None where there is none.

    Raises IntegrityError, naming the file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): int(known["bytes"]) for name, known in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged ({error!r}); restore the checkpoint") from None
    if manifest.get("format") != FORMAT:
        raise IntegrityError(f"{path}: format is {manifest.get('format')!r}, not {FORMAT!r}")
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise IntegrityError(f"{folder / name} has {found} bytes, its manifest says {size}; restore the checkpoint")
    return dict(manifest)


@contextlib.contextmanager
def new_folder(out: str | Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, everything on disk; else no trace.

    What a killed run left beside `out` is removed by the next one.
    overwrite: replace an earlier model folder (never anything else).
    Raises ConfigError as `check_output` does and where `out` cannot be made, StorageError where the disk runs full.
    """
    out = Path(os.path.abspath(out))
    check_output(out, overwrite=overwrite, inputs=inputs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in _beside(out, "tmp"):
            _remove_dead(left)
        work, lock = _work_folder(out)
    except OSError as error:
        raise ConfigError(f"output {out} cannot be made: {error.strerror}; choose another folder") from error
    try:
        yield work
        for path in [*work.rglob("*"), work]:
            sync_path(path)
        if out.exists():  # perhaps only since
            _may_replace(out, overwrite)
            os.rename(out, out.with_name(f"{out.name}.old-{uuid.uuid4().hex}"))
        os.rename(work, out)
        sync_path(out.parent)
        for old in _beside(out, "old"):
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{out}: the disk is full, nothing was left behind; free some of it") from error
        raise
    finally:
        os.close(lock)


def check_output(out: str | Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Raises ConfigError where `out` exists (and may not be replaced), or is, holds or lies inside one of `inputs`."""
    out = Path(os.path.abspath(out))
    for given in inputs:
        one, other = given.resolve(), out.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise ConfigError(f"output {out} overlaps the input {given}; choose another folder")
    if out.exists() or out.is_symlink():
        _may_replace(out, overwrite)
    parent = next(parent for parent in out.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is read-only" if parent.is_dir() else "is a file"
        raise ConfigError(f"output {out} cannot be made: {parent} {what}; choose another folder")


def _beside(out: Path, kind: str) -> list[Path]:
    """Folders that conversions to `out` have made beside it: `tmp` or `old`."""
    name = re.compile(re.escape(f"{out.name}.{kind}-") + "[0-9a-f]{32}")
    return [p for p in out.parent.iterdir() if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def _work_folder(out: Path) -> tuple[Path, int]:
    """A new folder and its lock, held until the process ends: a later run can tell that nobody works in it any more."""
    while True:
        work = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex}")
        work.mkdir()
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(lock)
            if work.is_dir():  # nobody took it for left behind before it was locked
                return work, lock
        except BlockingIOError:
            pass
        os.close(lock)


def _lock(folder: int) -> None:
    """Raises BlockingIOError where another process has it. A file system without locks is left at that."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return


def _remove_dead(work: Path) -> None:
    """Remove what a killed conversion left: the lock of one that lives cannot be had."""
    with contextlib.suppress(OSError):
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def check_room(out: str | Path, needed: int) -> None:
    """Raises StorageError where the disk of the future folder `out` has fewer bytes free than `needed`."""
    free = free_bytes(Path(out))
    if needed > free:
        raise StorageError(f"{out} needs {needed:,} bytes, {free:,} are free; choose another disk")


def free_bytes(out: Path) -> int:
    """Room on the disk that the future folder `out` will be on."""
    return shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.is_dir())).free


def _may_replace(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"output {out} exists and is not a folder; choose another name")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output {out} exists; choose another folder, or allow overwriting")
    if not is_checkpoint(out) and not _is_model(out):
        raise ConfigError(f"output {out} exists and is no model folder; it is not overwritten; choose another folder")
    folders = sorted(p.name for p in out.iterdir() if p.is_dir() and p.name != "hf")
    if folders:
        raise ConfigError(
            f"output {out} exists, and no conversion has made the folder {folders[0]} in it; it is not overwritten; "
            "choose another folder"
        )


def _is_model(folder: Path) -> bool:
    """Weights, and a config.json that names an architecture: many other programs have a config.json."""
    try:
        named = bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return named and has_weights(folder)
