"""Checkpoint folder -> Hugging Face folder. With dtype and vocabulary kept, every file is the original to the byte."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from megafuse.converters.digest import WeightsHasher
from megafuse.converters.folders import is_checkpoint, new_folder, open_weights, read_manifest
from megafuse.converters.hf_config import read_hf_config
from megafuse.converters.importer import Report, make_report
from megafuse.converters.layout import LAYOUT, Layout, layout_of, read_layout
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import INDEX, Header, SafetensorsFolder, make_header, side_files
from megafuse.converters.views import (
    DEFAULT_BLOCK,
    DTYPE_NAMES,
    CastView,
    HashedReads,
    TensorView,
    stream,
)
from megafuse.errors import ConfigError, IntegrityError

DTYPES = {"keep": None, "bfloat16": "BF16", "float32": "F32"}


def export_hf(
    ckpt: str | Path,
    out: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str = "keep",
    source: str = "model",
    overwrite: bool = False,
    block_mb: int = DEFAULT_BLOCK >> 20,
) -> Report:
    """Write the Hugging Face folder `out` from a checkpoint of any layout, ours or a training run's.

    Files, their order and headers, tokenizer and configuration come from the checkpoint's `hf/`, or from the Hugging
    Face folder `like`. Vocabulary padding and optimizer state are left out.
    dtype: `keep` writes what is stored, else every weight in `bfloat16` or `float32`, and config.json says so.
    source: `model`, or `fp32-master`: the optimizer's master weights of a training checkpoint.
    Raises IntegrityError where a file has another size than its manifest says, or the weights another digest;
    UnsupportedModelError for weights that would be lost; ConfigError where `out` exists and `overwrite` is False.
    """
    began, ckpt = time.monotonic(), Path(ckpt)
    like = Path(like) if like else None
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if block_mb < 1:
        raise ConfigError(f"block_mb = {block_mb} must be at least 1")
    if not is_checkpoint(ckpt):
        raise ConfigError(f"{ckpt} is no checkpoint folder (it has no .metadata)")
    manifest = read_manifest(ckpt) or {}
    inputs = (ckpt, like) if like else (ckpt,)
    with open_weights(ckpt, source=source, config=like) as (plan, view):
        if like and (ckpt / "hf" / "config.json").is_file():
            _check_like(plan, ckpt, like)
        layout = _layout(plan, ckpt, like)
        target = DTYPES[dtype]
        read = written = WeightsHasher(plan)
        weights: TensorView = HashedReads(view, read.add)
        plain = view
        if target:
            written = WeightsHasher(plan)
            weights, plain = HashedReads(CastView(weights, target), written.add), CastView(view, target)
        with new_folder(out, overwrite=overwrite, inputs=inputs) as work:
            total = _write_shards(plan, layout, weights, plain, work, bytearray(block_mb << 20))
            known = manifest.get("weights_sha256") if source == "model" else None
            if known and known != read.finish(view):
                raise IntegrityError(f"{ckpt}: the weights are not those of its manifest; restore the checkpoint")
            _write_side_files(plan, layout, weights, ckpt, like, work)
    return make_report("export", ckpt, out, plan, total, began, written.finish(weights))


def _check_like(plan: Plan, ckpt: Path, like: Path) -> None:
    own, given = read_hf_config(ckpt / "hf"), plan.model
    if replace(own, torch_dtype=given.torch_dtype) != given:
        raise ConfigError(f"like: {like} describes another model than {ckpt / 'hf'}: {given} instead of {own}")


def _layout(plan: Plan, ckpt: Path, like: Path | None) -> Layout:
    if like is None:
        return read_layout(ckpt / "hf", plan)
    with SafetensorsFolder(like) as shards:
        plan.check(shards, where=str(like))
        return layout_of(plan, shards)


def _write_shards(
    plan: Plan, layout: Layout, weights: TensorView, plain: TensorView, work: Path, buffer: bytearray
) -> int:
    """Write every shard; returns the bytes of tensors. `plain` reads the embedding again for a tied output layer."""
    total = 0
    for file, old in layout.headers.items():
        header = new_header(plan, layout, old, weights)
        total += header.data_bytes
        with (work / file).open("xb") as out:
            out.write(header.encoded())
            for entry in header.entries:
                if entry.name in layout.derived:
                    out.write(layout.derived[entry.name])
                elif plan.tied_twin and entry.name == plan.tied_twin[0]:
                    _copy(plain, plan.tied_twin[1], out, buffer)
                else:
                    _copy(weights, entry.name, out, buffer)
    return total


def _copy(view: TensorView, name: str, out: BinaryIO, buffer: bytearray) -> None:
    for block in stream(view, name, buffer):
        out.write(block)


def new_header(plan: Plan, layout: Layout, old: Header, weights: TensorView) -> Header:
    """The old header where no dtype has changed, else one like it with the new dtypes."""
    wanted = []
    for entry in old.entries:
        name = plan.tied_twin[1] if plan.tied_twin and entry.name == plan.tied_twin[0] else entry.name
        wanted.append((entry.name, entry.dtype if name in layout.derived else weights.dtype(name), entry.shape))
    if wanted == [(e.name, e.dtype, e.shape) for e in old.entries]:
        return old
    return make_header(wanted, old.metadata)


def _write_side_files(
    plan: Plan, layout: Layout, weights: TensorView, ckpt: Path, like: Path | None, work: Path
) -> None:
    """Copy configuration, tokenizer and the rest; where dtypes changed, say so in config.json and the shard index."""
    if like:
        sources = [path for path, kept in side_files(like) if kept]
    else:
        sources = [path for path in sorted((ckpt / "hf").iterdir()) if path.is_file() and path.name != LAYOUT]
    for path in sources:
        if (work / path.name).exists():
            raise IntegrityError(f"{path} has the name of a weights file; restore the checkpoint's hf/ folder")
        shutil.copyfile(path, work / path.name)
    kept = all(new_header(plan, layout, header, weights) is header for header in layout.headers.values())
    if kept:
        return
    dtypes = {weights.dtype(name) for name in plan.hf_shapes}
    if len(dtypes) == 1:
        _edit_json(work / "config.json", lambda config: _set_dtype(config, DTYPE_NAMES[dtypes.pop()]))
    if (work / INDEX).is_file():
        size = sum(new_header(plan, layout, header, weights).data_bytes for header in layout.headers.values())
        _edit_json(work / INDEX, lambda index: index.setdefault("metadata", {}).update(total_size=size))


def _set_dtype(config: dict[str, Any], name: str) -> None:
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, name))


def _edit_json(path: Path, change: Any) -> None:
    """Change a JSON file in place; keys keep their order, the style is Hugging Face's."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
