"""What a model folder holds, without reading its weights."""

from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from megafuse.converters.dcp_reader import DcpFolder
from megafuse.converters.folders import is_checkpoint, read_manifest
from megafuse.converters.hf_config import read_hf_config
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import SafetensorsFolder
from megafuse.errors import ConfigError


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts about a Hugging Face folder or a checkpoint, ready for JSON.

    Keys: `kind`, `architecture` (the fields of ModelArch), `parameters`, `dtypes` (tensors by dtype), `missing` and
    `unexpected` tensors compared with config.json, `padded` ({name: stored rows}), and for a checkpoint `step`,
    `weights_sha256`, `optimizer` and `stacked`, for a Hugging Face folder `shards` (bytes by file).
    Raises ConfigError, UnsupportedModelError or IntegrityError where the folder cannot be understood at all.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; fix: give a Hugging Face model folder or a checkpoint folder")
    return _checkpoint(folder) if is_checkpoint(folder) else _huggingface(folder)


def _huggingface(folder: Path) -> dict[str, Any]:
    plan = Plan(read_hf_config(folder))
    with SafetensorsFolder(folder) as shards:
        names = [n for n in shards.names() if not plan.is_derived(n) and (plan.tied_twin or ("",))[0] != n]
        shapes = {name: shards.shape(name) for name in names}
        dtypes = Counter(shards.dtype(name) for name in names)
        files = {name: (folder / name).stat().st_size for name in shards.headers}
    return {"kind": "huggingface", **_compared(plan, plan.hf_shapes, shapes, dtypes), "shards": files}


def _checkpoint(folder: Path) -> dict[str, Any]:
    plan = Plan(read_hf_config(folder / "hf"))
    manifest = read_manifest(folder) or {}
    with DcpFolder(folder) as weights:
        shapes = {name: weights.shape(name) for name in weights.names()}
        facts = _compared(
            plan,
            {name: packed.shape for name, packed in plan.tensors.items()},
            shapes,
            Counter(weights.dtype(name) for name in shapes),
        )
        return {
            "kind": "torch_dist",
            "step": manifest.get("step"),
            "weights_sha256": manifest.get("weights_sha256"),
            **facts,
            "optimizer": weights.has_optimizer,
            "stacked": weights.stacked,
        }


def _compared(
    plan: Plan, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], dtypes: Counter[str]
) -> dict[str, Any]:
    return {
        "architecture": asdict(plan.model),
        "parameters": plan.parameters,
        "stored": sum(prod(shape) for shape in found.values()),
        "dtypes": dict(dtypes),
        "missing": sorted(set(wanted) - set(found)),
        "unexpected": sorted(set(found) - set(wanted)),
        "padded": {n: list(found[n]) for n in sorted(set(found) & set(wanted)) if found[n] != wanted[n]},
    }
