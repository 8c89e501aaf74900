"""Is this checkpoint whole, and is it that model? File hashes, then every weight, bit by bit."""

import filecmp
from dataclasses import dataclass, replace
from pathlib import Path

from megafuse.converters.digest import WeightsHasher
from megafuse.converters.folders import is_checkpoint, open_weights, read_manifest
from megafuse.converters.formats import describes_other_weights
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import side_files
from megafuse.converters.views import DEFAULT_BLOCK, TensorView, stream
from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.manifest import file_sha256


@dataclass(frozen=True)
class VerifyReport:
    """What was compared and found equal.

    Attributes:
        files: files whose sha256 is that of the manifest.
        unhashed: files of which the manifest knows the size only (equal as well).
        tensors: HF tensors equal in dtype, shape and every bit.
        weights_sha256: digest of the weights.
        side_files_differ: files beside the weights (tokenizer, templates) that are absent on one side or differ.
    """

    files: int
    unhashed: tuple[str, ...] = ()
    tensors: int = 0
    weights_sha256: str | None = None
    side_files_differ: tuple[str, ...] = ()


def verify(ckpt: str | Path, hf_dir: str | Path | None = None, *, block_mb: int = DEFAULT_BLOCK >> 20) -> VerifyReport:
    """Check the files of a checkpoint against its manifest and, with `hf_dir`, its weights against that folder's.

    Raises IntegrityError naming the files or tensors that differ, ConfigError where a folder is not what it should be.
    """
    ckpt = Path(ckpt)
    if not is_checkpoint(ckpt):
        raise ConfigError(f"{ckpt} is no checkpoint folder (it has no .metadata)")
    files, unhashed, known = verify_files(ckpt)
    if hf_dir is None:
        return VerifyReport(files, unhashed, weights_sha256=known)
    hf_dir = Path(hf_dir)
    with open_weights(ckpt) as (plan, mine), open_weights(hf_dir) as (other, theirs):
        if replace(plan.model, torch_dtype=other.model.torch_dtype) != other.model:
            raise IntegrityError(f"{ckpt} and {hf_dir} are different models: {plan.model} and {other.model}")
        digest = compare_bits(plan, mine, theirs, block_bytes=block_mb << 20)
    if known and known != digest:
        raise IntegrityError(f"{ckpt}: the weights are not those of its manifest; restore the checkpoint")
    return VerifyReport(files, unhashed, len(plan.hf_shapes), digest, _side_files_differ(ckpt / "hf", hf_dir))


def verify_files(ckpt: Path) -> tuple[int, tuple[str, ...], str | None]:
    """(files with the right hash, files without a hash, weights digest of the manifest).

    Raises IntegrityError, naming every file that is missing, of another size, changed, or not in the manifest.
    """
    manifest = read_manifest(ckpt)
    if manifest is None:
        return 0, tuple(sorted(p.relative_to(ckpt).as_posix() for p in ckpt.rglob("*") if p.is_file())), None
    listed = manifest["files"]
    hashed = {name: known["sha256"] for name, known in listed.items() if known.get("sha256")}
    changed = [name for name, digest in hashed.items() if file_sha256(ckpt / name) != digest]
    strangers = [p.name for p in ckpt.glob("*.distcp") if p.name not in listed]
    if changed or strangers:
        raise IntegrityError(
            f"{ckpt}: {len(changed)} files are damaged: {changed[:5]}; {len(strangers)} are not in the manifest: "
            f"{strangers[:5]}; restore the checkpoint"
        )
    return len(hashed), tuple(sorted(set(listed) - set(hashed))), manifest.get("weights_sha256")


def compare_bits(plan: Plan, mine: TensorView, theirs: TensorView, *, block_bytes: int) -> str:
    """Compare every HF tensor of two views; returns the digest of the weights that they share.

    Raises IntegrityError with the first five tensors that differ and their number.
    """
    hasher, differ = WeightsHasher(plan), []
    left, right = bytearray(block_bytes // 2), bytearray(block_bytes // 2)
    for name in plan.hf_shapes:
        if mine.dtype(name) != theirs.dtype(name):
            differ.append(f"{name} ({mine.dtype(name)} and {theirs.dtype(name)})")
            continue
        same = True
        for one, two in zip(stream(mine, name, left), stream(theirs, name, right)):
            hasher.add(name, one)
            same = same and one == two
        if not same:
            differ.append(name)
    if differ:
        raise IntegrityError(f"{len(differ)} of {len(plan.hf_shapes)} tensors differ: {', '.join(differ[:5])}")
    return hasher.finish(mine)


def _side_files_differ(kept: Path, hf_dir: Path) -> tuple[str, ...]:
    theirs = {path.name for path, keep in side_files(hf_dir) if keep}
    there = {path.name for path in kept.iterdir() if path.is_file()} - {"layout.json"}
    ours = {name for name in there if not describes_other_weights(name)}
    shared = [n for n in ours & theirs if not filecmp.cmp(kept / n, hf_dir / n, shallow=False)]
    return tuple(sorted([*(ours ^ theirs), *shared]))
