"""`megafuse convert`: Hugging Face folders to checkpoints and back, compared and described."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from megafuse.config.base import Config

if TYPE_CHECKING:
    from megafuse.converters.importer import Report

DESCRIPTION = "Convert between Hugging Face folders and Megatron checkpoints: bytes only, no model, no GPU."


class ImportConfig(Config):
    """Hugging Face folder -> Megatron checkpoint."""

    hf_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF_DIR")]
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Checkpoint folder to write."""
    block_mb: Annotated[int, Field(ge=1)] = 64
    """MiB copied at a time; bounds the memory."""
    overwrite: bool = False
    """Replace `out` where it is an earlier model folder."""


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
    block_mb: Annotated[int, Field(ge=1)] = 64
    """MiB copied at a time; bounds the memory."""
    overwrite: bool = False
    """Replace `out` where it is an earlier model folder."""


class VerifyConfig(Config):
    """Check a checkpoint's files, and compare its weights with a Hugging Face folder."""

    ckpt: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder."""
    hf_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF_DIR")]
    """Hugging Face folder to compare with."""
    block_mb: Annotated[int, Field(ge=1)] = 64
    """MiB compared at a time; bounds the memory."""
    logits: bool = False
    """Also load both models in fp32 and compare their logits on random tokens (needs the memory of a model)."""


class InspectConfig(Config):
    """Say what a folder holds."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Hugging Face folder or checkpoint folder."""


def run_import(config: ImportConfig) -> int:
    """Import and print one line."""
    from megafuse.converters.importer import import_hf

    _print(import_hf(config.hf_dir, config.out, block_mb=config.block_mb, overwrite=config.overwrite))
    return 0


def run_export(config: ExportConfig) -> int:
    """Export and print one line."""
    from megafuse.converters.exporter import export_hf

    settings = config.model_dump(exclude={"ckpt", "out"})
    _print(export_hf(config.ckpt, config.out, **settings))
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Verify and say what was compared; a difference is an error (exit code 3)."""
    from megafuse.converters.verify import verify

    report = verify(config.ckpt, config.hf_dir, block_mb=config.block_mb)
    print(f"{report.files} files match their hashes, {report.tensors} tensors are equal in every bit")
    if report.unhashed:
        print(f"no hash in the manifest (sizes checked): {', '.join(report.unhashed)}")
    if report.side_files_differ:
        print(f"beside the weights these differ: {', '.join(report.side_files_differ)}")
    print(f"weights sha256 {report.weights_sha256}")
    if config.logits:
        from megafuse.converters.logits import compare_logits

        found = compare_logits(config.ckpt, config.hf_dir)
        print(
            f"logits of {found.tokens} tokens differ by at most {found.difference:.1e} where the largest is "
            f"{found.largest:.1f}; argmax agrees at {found.agree:.1%}"
        )
    return 0


def run_inspect(config: InspectConfig) -> int:
    """Print the facts as JSON."""
    from megafuse.converters.inspect import inspect

    print(json.dumps(inspect(config.path), indent=2))
    return 0


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
