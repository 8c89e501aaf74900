"""`megafuse convert`: Hugging Face folders to checkpoints and back, compared and described."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from megafuse.config.base import Config

if TYPE_CHECKING:
    from megafuse.converters.importer import Report
    from megafuse.converters.jobs import OnBytes

DESCRIPTION = "Convert between Hugging Face folders and Megatron checkpoints: bytes only, no model, no GPU."


class ImportConfig(Config):
    """Hugging Face folder -> Megatron checkpoint."""

    hf_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF_DIR")]
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Checkpoint folder to write."""
    block_mb: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """MiB copied at a time by each job; bounds the memory."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Blocks copied side by side. The files do not depend on it; memory grows by two blocks for each."""
    overwrite: bool = False
    """Replace `out` where it is an earlier model folder."""
    dry_run: bool = False
    """Say what would be written and how much memory it takes, and refuse what an import refuses; write nothing."""


class ExportConfig(Config):
    """Megatron checkpoint -> Hugging Face folder."""

    ckpt: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder: an imported one or one of a training run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Hugging Face folder to write."""
    like: Path | None = None
    """Hugging Face folder that gives file layout, configuration and tokenizer instead of the checkpoint's own."""
    dtype: Literal["keep", "bfloat16", "float32"] = "keep"
    """What the weights are written in; `keep` is what is stored."""
    source: Literal["model", "fp32-master"] = "model"
    """`fp32-master`: the optimizer's master weights instead of the model's."""
    max_shard_gb: Annotated[float | None, Field(gt=0, le=1e6)] = None
    """Write new files of at most so many GB, with their index. None: the files of the source, or of 5 GB if unknown."""
    block_mb: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """MiB copied at a time by each job; bounds the memory."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Blocks copied side by side. The files do not depend on it; memory grows by two blocks for each."""
    overwrite: bool = False
    """Replace `out` where it is an earlier model folder."""


class VerifyConfig(Config):
    """Is this checkpoint that model? Plan, bits, a real load at several layouts, saving again, logits."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Checkpoint folder or Hugging Face folder."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The other one of the two."""
    upto: Literal["plan", "bits", "load", "save", "logits"] = "logits"
    """The last rung to climb. From `load` on the model is built in fp32, on this machine: up to `bits` it is not."""
    layouts: tuple[str, ...] = ()
    """Layouts to load at, such as `tp2-pp2`; each takes that many processes. None given: those that fit up to a few."""
    tokens: Annotated[int | None, Field(ge=2)] = None
    """Length of the sequence whose logits are compared. None: past the model's window and rope scaling's knee."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    """Largest difference of logits that passes, as a share of the largest logit."""
    seed: Annotated[int, Field(ge=0, le=1 << 62)] = 0
    """Of the random tokens."""
    block_mb: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """MiB compared at a time; bounds the memory."""


class InspectConfig(Config):
    """Say what a folder holds."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Hugging Face folder or checkpoint folder."""


def run_import(config: ImportConfig) -> int:
    """Import and print one line."""
    from megafuse.converters.importer import dry_run, import_hf
    from megafuse.errors import StorageError

    if config.dry_run:
        settings = config.model_dump(include={"block_mb", "jobs", "overwrite"})
        plan = dry_run(config.hf_dir, config.out, **settings)
        print(
            f"would import {plan.architecture}, {plan.parameters:,} parameters, {plan.tensors} tensors, "
            f"{plan.bytes / 1e9:.2f} GB, at most {plan.peak_rss_mib} MiB of memory"
        )
        for name, size in plan.files.items():
            print(f"{size:>16,}  {plan.out}/{name}")
        if plan.skipped:
            print(f"not copied: {', '.join(plan.skipped)}")
        print(f"{plan.free_bytes / 1e9:.2f} GB are free there: {'it fits' if plan.fits else 'IT DOES NOT FIT'}")
        return 0 if plan.fits else StorageError.exit_code
    settings = config.model_dump(exclude={"hf_dir", "out", "dry_run"})
    with _progress("import") as show:
        report = import_hf(config.hf_dir, config.out, **settings, show=show)
    _print(report)
    return 0


def run_export(config: ExportConfig) -> int:
    """Export and print one line."""
    from megafuse.converters.exporter import export_hf

    settings = config.model_dump(exclude={"ckpt", "out"})
    with _progress("export") as show:
        report = export_hf(config.ckpt, config.out, **settings, show=show)
    _print(report)
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Climb the ladder, print every rung as it is done, then the verdict; exit code 3 where one does not hold."""
    from megafuse.converters.ladder import Finding, verify_ladder
    from megafuse.errors import IntegrityError
    from megafuse.parallel.quiet import quiet_dependencies

    def show(finding: Finding) -> None:
        mark = "ok  " if finding.ok else "FAIL"
        print(f"{mark}  {finding.rung:<6}  {finding.layout:<14}  {finding.detail}", flush=True)

    settings = config.model_dump(exclude={"src", "dst"})
    with quiet_dependencies():
        found = verify_ladder(config.src, config.dst, show=show, **settings)
    failed = [finding for finding in found if not finding.ok]
    if failed:
        print(f"verdict: NOT the same model; it fails at rung {failed[0].rung!r}")
        return IntegrityError.exit_code
    print(f"verdict: the same model, up to rung {config.upto!r} ({len(found)} checks)")
    return 0


def run_inspect(config: InspectConfig) -> int:
    """Print the facts as JSON."""
    from megafuse.converters.inspect import inspect

    print(json.dumps(inspect(config.path), indent=2))
    return 0


@contextlib.contextmanager
def _progress(title: str) -> Iterator["OnBytes"]:
    """Shows megabytes done, MB/s and the time left on standard error."""
    from megafuse.observe.progress import Progress

    began, unit = time.monotonic(), 1_000_000
    with contextlib.ExitStack() as stack:
        shown: list[Progress] = []

        def show(done: int, total: int) -> None:
            most = -(-total // unit)
            if not shown:
                shown.append(stack.enter_context(Progress(most, f"{title}, MB", enabled=True)))
            rate = done / unit / max(time.monotonic() - began, 1e-9)
            shown[0].update(most if done >= total else done // unit, {"mb_per_second": rate})

        yield show


def _print(report: "Report") -> None:
    rate = report.bytes / 1e6 / max(report.seconds, 1e-9)
    print(
        f"{report.action}: {report.architecture}, {report.parameters:,} parameters, {report.tensors} tensors, "
        f"{report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s ({rate:.0f} MB/s), peak {report.peak_rss_mib} MiB"
    )
    if report.skipped:
        print(f"not copied: {', '.join(report.skipped)}")
    print(f"{report.out}\nweights sha256 {report.weights_sha256}")


COMMANDS: dict[str, tuple[type[Config], Callable[[Any], int]]] = {
    "import": (ImportConfig, run_import),
    "export": (ExportConfig, run_export),
    "verify": (VerifyConfig, run_verify),
    "inspect": (InspectConfig, run_inspect),
}
