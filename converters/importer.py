"""Hugging Face folder -> checkpoint folder: bytes are copied, nothing is computed, no model is built."""

import contextlib
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from megafuse.converters.dcp_writer import plan_files, write_torch_dist
from megafuse.converters.digest import WeightsHasher
from megafuse.converters.folders import (
    FORMAT,
    MANIFEST,
    check_output,
    check_room,
    free_bytes,
    is_checkpoint,
    new_folder,
    open_weights,
)
from megafuse.converters.jobs import Meter, OnBytes, check_jobs
from megafuse.converters.layout import LAYOUT, layout_of
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import SafetensorsFolder, side_files
from megafuse.converters.views import DEFAULT_BLOCK, row_bytes, tensor_bytes
from megafuse.errors import ConfigError, DataError
from megafuse.observe.manifest import file_sha256, utc_now, versions, write_json_atomic


@dataclass(frozen=True)
class Report:
    """What a conversion did: `bytes` of weights in `tensors` HF tensors, `seconds`, peak memory, and what was left out.

    `weights_sha256` is the digest of the weights as written; `skipped` names what of the source is not in the output.
    """

    action: str
    source: str
    out: str
    architecture: str
    parameters: int
    tensors: int
    bytes: int
    seconds: float
    peak_rss_mib: int
    weights_sha256: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class DryRun:
    """What an import would do.

    `files`: bytes by name of what would be written (weights without their small headers, side files as they are),
    `skipped`: what would not be copied, `peak_rss_mib`: a bound on the memory, `free_bytes`: room on the disk.
    """

    source: str
    out: str
    architecture: str
    parameters: int
    tensors: int
    bytes: int
    files: dict[str, int]
    skipped: tuple[str, ...]
    peak_rss_mib: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        """There is room for it."""
        return sum(self.files.values()) <= self.free_bytes


def dry_run(
    hf_dir: str | Path,
    out: str | Path,
    *,
    block_mb: int = DEFAULT_BLOCK >> 20,
    jobs: int = 1,
    overwrite: bool = False,
) -> DryRun:
    """What `import_hf` would write and need; writes nothing. Raises as it does, but for a disk that is too small.

    Reads headers alone, and the output layer of a tied model that holds one.
    """
    check_jobs(jobs, block_mb)
    hf_dir, out = Path(hf_dir), Path(out).absolute()
    check_output(out, overwrite=overwrite, inputs=(hf_dir,))
    if is_checkpoint(hf_dir):
        raise ConfigError(f"{hf_dir} is a checkpoint, not a Hugging Face folder; fix: use export")
    with open_weights(hf_dir) as (plan, shards):
        total = sum(tensor_bytes(shards.dtype(name), shape) for name, shape in plan.hf_shapes.items())
        widest = max(row_bytes(shards.dtype(name), shape) for name, shape in plan.hf_shapes.items())
        tensors = len(plan.hf_shapes)
        files = {
            name: sum(tensor_bytes(shards.dtype(packed.pieces[0].hf), packed.shape) for packed in held)
            for name, held in plan_files(plan, shards).items()
        }
        assert isinstance(shards, SafetensorsFolder)
        check_tied(plan, shards, block_mb << 20)
    sides = _side_files(hf_dir)
    return DryRun(
        source=str(hf_dir),
        out=str(out),
        architecture=plan.model.architecture,
        parameters=plan.parameters,
        tensors=tensors,
        bytes=total,
        files={**files, **{f"hf/{path.name}": path.stat().st_size for path, kept in sides if kept}},
        skipped=tuple(path.name for path, kept in sides if not kept),
        # for each job a block being read and the one before it, which the writer may still hold
        peak_rss_mib=peak_rss_mib() + (jobs * 2 * max(block_mb << 20, widest) >> 20),
        free_bytes=free_bytes(out),
    )


def import_hf(
    hf_dir: str | Path,
    out: str | Path,
    *,
    block_mb: int = DEFAULT_BLOCK >> 20,
    jobs: int = 1,
    overwrite: bool = False,
    show: OnBytes | None = None,
) -> Report:
    """Write the checkpoint folder `out` from the Hugging Face folder `hf_dir`.

    block_mb: MiB copied at a time by each of `jobs` threads; they bound the memory. Equal inputs give equal `.distcp`
    files, whatever the two are. show: told of (bytes done, bytes of all) now and then.
    Raises UnsupportedModelError for a configuration or tensor that no rule covers, IntegrityError for damaged weights
    or a tied output layer that differs from the embedding, ConfigError where `out` exists and `overwrite` is False,
    StorageError where the disk is too small.
    """
    began, hf_dir = time.monotonic(), Path(hf_dir)
    planned = dry_run(hf_dir, out, block_mb=block_mb, jobs=jobs, overwrite=overwrite)
    check_room(out, sum(planned.files.values()))
    with open_weights(hf_dir) as (plan, shards), new_folder(out, overwrite=overwrite, inputs=(hf_dir,)) as work:
        assert isinstance(shards, SafetensorsFolder)
        hasher = WeightsHasher(plan)
        meter = Meter(planned.bytes, show)
        hashes = write_torch_dist(
            plan, shards, work, block_bytes=block_mb << 20, seen=hasher.add, jobs=jobs, meter=meter
        )
        digest = hasher.finish(shards)
        skipped = _keep_side_files(hf_dir, work / "hf", plan, shards)
        files = {p.relative_to(work).as_posix(): p for p in sorted(work.rglob("*")) if p.is_file()}
        write_json_atomic(
            work / MANIFEST,
            {
                "format": FORMAT,
                "step": 0,
                "created": utc_now(),
                "weights_sha256": digest,
                "architecture": plan.model.architecture,
                "parameters": plan.parameters,
                "source": {
                    "kind": "huggingface",
                    "name": hf_dir.resolve().name,
                    "bytes": planned.bytes,
                    "skipped": skipped,
                },
                "versions": versions(),
                "files": {
                    name: {"bytes": path.stat().st_size, "sha256": hashes.get(name) or file_sha256(path)}
                    for name, path in files.items()
                },
            },
        )
    return make_report("import", hf_dir, out, plan, planned.bytes, began, digest, tuple(skipped))


def make_report(
    action: str,
    source: Path,
    out: str | Path,
    plan: Plan,
    total: int,
    began: float,
    digest: str,
    skipped: tuple[str, ...] = (),
) -> Report:
    """The report of a conversion that began at `began` (time.monotonic)."""
    return Report(
        action=action,
        source=str(source),
        out=str(out),
        architecture=plan.model.architecture,
        parameters=plan.parameters,
        tensors=len(plan.hf_shapes),
        bytes=total,
        seconds=time.monotonic() - began,
        peak_rss_mib=peak_rss_mib(),
        weights_sha256=digest,
        skipped=skipped,
    )


def peak_rss_mib() -> int:
    """The most memory that this process has had so far, in MiB.

    VmHWM where there is /proc: ru_maxrss would start at what the parent had when it started us.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def refuse_other_head(hf_dir: Path) -> None:
    """`check_tied` of a folder that is not imported but read as it is."""
    with open_weights(hf_dir) as (plan, shards):
        assert isinstance(shards, SafetensorsFolder)
        check_tied(plan, shards, DEFAULT_BLOCK)


def check_tied(plan: Plan, shards: SafetensorsFolder, block_bytes: int) -> None:
    """A tied model may hold its output layer as well: then it must be the embedding, bit by bit.

    Raises DataError where it is not: nobody can know which of the two is meant.
    """
    if not plan.tied_twin or plan.tied_twin[0] not in shards.names():
        return
    head, embedding = plan.tied_twin
    same = shards.dtype(head) == shards.dtype(embedding) and shards.shape(head) == shards.shape(embedding)
    if same:
        rows, width = shards.shape(head)[0], row_bytes(shards.dtype(head), shards.shape(head))
        step = max(1, block_bytes // 2 // width)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            left, right = bytearray((stop - start) * width), bytearray((stop - start) * width)
            shards.read(head, start, stop, memoryview(left))
            shards.read(embedding, start, stop, memoryview(right))
            if left != right:
                same = False
                break
    if not same:
        raise DataError(
            f"{shards.folder}: config.json has tie_word_embeddings = true, but {head} differs from {embedding}; "
            "fix: set tie_word_embeddings to false, or delete the tensor that is not meant"
        )


def keep_side_files(hf_dir: Path, keep: Path) -> list[str]:
    """Write into the new folder `keep` what is not weights in `hf_dir`, and how the weights lay in files.

    Returns the names of what was left out. Raises as `import_hf` does.
    """
    with open_weights(hf_dir) as (plan, shards):
        assert isinstance(shards, SafetensorsFolder)
        return _keep_side_files(hf_dir, keep, plan, shards)


def _keep_side_files(hf_dir: Path, keep: Path, plan: Plan, shards: SafetensorsFolder) -> list[str]:
    keep.mkdir()
    skipped = []
    for path, kept in _side_files(hf_dir):
        if kept:
            shutil.copyfile(path, keep / path.name)
        else:
            skipped.append(path.name + ("/" if path.is_dir() else ""))
    write_json_atomic(keep / LAYOUT, layout_of(plan, shards).to_json())
    return skipped


def _side_files(hf_dir: Path) -> list[tuple[Path, bool]]:
    """As `side_files`. Raises DataError for the name that a checkpoint gives to a file of its own."""
    sides = list(side_files(hf_dir))
    if any(path.name == LAYOUT for path, _ in sides):
        raise DataError(f"{hf_dir / LAYOUT}: this name is reserved for checkpoints; rename the file")
    return sides
