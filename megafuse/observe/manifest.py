"""What every stage writes beside its output: hashes, versions, times, and JSON files that are whole or absent."""

import contextlib
import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, BinaryIO

from megafuse import __version__
from megafuse.errors import IntegrityError

_PACKAGES = ("torch", "megatron-core", "transformers", "datasets", "numpy")


def file_sha256(path: str | Path, *, chunk_bytes: int = 1 << 22) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises OSError where the file cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of Python, megafuse and the packages that decide numbers; None where one is not installed.

    Reads package metadata only: nothing is imported, so a manifest costs milliseconds.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "megafuse": __version__}
    for package in _PACKAGES:
        try:
            found[package] = installed_version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def utc_now() -> str:
    """The time now in UTC, as `2025-01-31T12:00:00Z`."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` only when the block ends well; otherwise nothing is left.

    The bytes are on disk before the rename and the rename before the return, so that a reader (or this program after
    a power cut) sees the old file or the new one, never a part. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its mode 0600 would hide the file from the user's group. The random part is for shared file systems,
    # where two nodes may have the same process id.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, whole or not at all (temporary file, fsync, rename).

    Keys keep their order. Paths become strings, dataclasses objects, and numpy scalars and arrays numbers and lists.
    Raises ValueError for NaN or infinity, which JSON does not have, and TypeError for anything else it cannot hold; in
    both cases the file that was there before is untouched.
    """
    text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    with atomic_file(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises IntegrityError, naming the file and the place, where it is absent or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise IntegrityError(f"{path} does not exist: the stage that writes it did not finish; run it again") from None
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON ({error}): run the stage that writes it again") from None


def read_manifest_of(folder: Path, known_format: str) -> dict[str, Any]:
    """`manifest.json` of a folder that a stage wrote.

    Raises:
        IntegrityError: there is none, it cannot be read, or it is of another format.
    """
    manifest = read_json(folder / "manifest.json")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != known_format:
        raise IntegrityError(f"{folder / 'manifest.json'} has format {found!r}, expected {known_format!r}")
    return dict(manifest)


def _plain(value: Any) -> Any:
    """JSON form of the few types that manifests hold beyond JSON's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing them
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def sync_path(path: Path) -> None:
    """Put a file, or the names in a folder, on disk; some network file systems refuse to sync folders, and need not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
