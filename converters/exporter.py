"""Checkpoint folder -> Hugging Face folder. With dtype and vocabulary kept, every file is the original to the byte."""

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megafuse.converters.digest import WeightsHasher
from megafuse.converters.folders import check_room, is_checkpoint, new_folder, open_weights, read_manifest
from megafuse.converters.formats import INDEX, describes_other_weights
from megafuse.converters.hf_config import read_hf_config
from megafuse.converters.importer import Report, make_report
from megafuse.converters.jobs import Meter, OnBytes, check_jobs, run_jobs
from megafuse.converters.layout import LAYOUT, Layout, layout_of, read_layout
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import Header, SafetensorsFolder, has_weights, make_header, side_files
from megafuse.converters.sharding import DEFAULT_SHARD_GB, index_text, resharded
from megafuse.converters.views import (
    DEFAULT_BLOCK,
    DTYPE_NAMES,
    CastView,
    HashedReads,
    TensorView,
    pwrite_all,
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
    max_shard_gb: float | None = None,
    overwrite: bool = False,
    block_mb: int = DEFAULT_BLOCK >> 20,
    jobs: int = 1,
    show: OnBytes | None = None,
) -> Report:
    """Write the Hugging Face folder `out` from a checkpoint of any layout, ours or a training run's.

    Files, their order and headers, tokenizer and configuration come from the checkpoint's `hf/`, or from the Hugging
    Face folder `like`. Vocabulary padding and optimizer state are left out.
    dtype: `keep` writes what is stored, else every weight in `bfloat16` or `float32`, and config.json says so.
    source: `model`, or `fp32-master`: the optimizer's master weights of a training checkpoint.
    max_shard_gb: write new files of at most so many gigabytes (1e9 bytes), as transformers would, with their index,
    instead of those of the source; so it is too, at 5 GB, where nobody knows how the source lay in files.
    block_mb: MiB copied at a time by each of `jobs` threads; the files do not depend on either.
    show: told of (bytes done, bytes of all) now and then.
    Raises IntegrityError where a file has another size than its manifest says, or the weights another digest;
    UnsupportedModelError for weights that would be lost; ConfigError where `out` exists and `overwrite` is False;
    StorageError where the disk is too small.
    """
    began, ckpt = time.monotonic(), Path(ckpt)
    like = Path(like) if like else None
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if max_shard_gb is not None and not 0 < max_shard_gb <= 1e6:
        raise ConfigError(f"max_shard_gb = {max_shard_gb} must be above 0, and 1e6 at most")
    if like and not like.is_dir():
        raise ConfigError(f"like: {like} is not a folder; fix: give a Hugging Face model folder")
    check_jobs(jobs, block_mb)
    if not is_checkpoint(ckpt):
        raise ConfigError(f"{ckpt} is no checkpoint folder (it has no .metadata)")
    manifest = read_manifest(ckpt) or {}
    inputs = (ckpt, like) if like else (ckpt,)
    with open_weights(ckpt, source=source, config=like) as (plan, view):
        if like and (ckpt / "hf" / "config.json").is_file():
            _check_like(plan, ckpt, like)
        old = _layout(plan, ckpt, like)
        target = DTYPES[dtype]
        read = written = WeightsHasher(plan)
        weights: TensorView = HashedReads(view, read.add)
        plain = view
        if target:
            written = WeightsHasher(plan)
            weights, plain = HashedReads(CastView(weights, target), written.add), CastView(view, target)
        if old is None or max_shard_gb is not None:
            layout = resharded(plan, old, weights, int((max_shard_gb or DEFAULT_SHARD_GB) * 1e9))
        else:
            layout = Layout(
                {n: new_header(plan, old, header, weights) for n, header in old.headers.items()}, old.derived
            )
        total = sum(header.data_bytes for header in layout.headers.values())
        check_room(out, total)
        with new_folder(out, overwrite=overwrite, inputs=inputs) as work:
            _write_shards(plan, layout, weights, plain, work, block_mb << 20, jobs, Meter(total, show))
            known = manifest.get("weights_sha256") if source == "model" else None
            if known and known != read.finish(view):
                raise IntegrityError(f"{ckpt}: the weights are not those of its manifest; restore the checkpoint")
            skipped = _write_side_files(plan, old, layout, weights, ckpt, like, work)
    return make_report("export", ckpt, out, plan, total, began, written.finish(weights), skipped)


def _check_like(plan: Plan, ckpt: Path, like: Path) -> None:
    own, given = read_hf_config(ckpt / "hf"), plan.model
    if replace(own, torch_dtype=given.torch_dtype) != given:
        raise ConfigError(f"like: {like} describes another model than {ckpt / 'hf'}: {given} instead of {own}")


def _layout(plan: Plan, ckpt: Path, like: Path | None) -> Layout | None:
    """How the weights lay in the source's files; None where neither `like` nor the checkpoint knows."""
    if like is None:
        return read_layout(ckpt / "hf", plan) if (ckpt / "hf" / LAYOUT).is_file() else None
    if not has_weights(like):
        return None
    with SafetensorsFolder(like) as shards:
        plan.check(shards, where=str(like))
        return layout_of(plan, shards)


def _write_shards(
    plan: Plan,
    layout: Layout,
    weights: TensorView,
    plain: TensorView,
    work: Path,
    block_bytes: int,
    jobs: int,
    meter: Meter,
) -> None:
    """Write every file; a task is a tensor, whose place is known. `plain` reads the embedding again for its twin."""
    buffers = threading.local()

    def copy(view: TensorView, name: str, path: Path, at: int) -> None:
        if not hasattr(buffers, "block"):
            buffers.block = bytearray(block_bytes)
        fd = os.open(path, os.O_WRONLY)
        try:
            for block in stream(view, name, buffers.block):
                meter.add(0)
                pwrite_all(fd, at, block)
                at += len(block)
                meter.add(len(block))
        finally:
            os.close(fd)

    tasks = []
    for file, header in layout.headers.items():
        start = header.encoded()
        (work / file).write_bytes(start)
        for entry in header.entries:
            at = len(start) + entry.offset
            if entry.name in layout.derived:
                tasks.append(partial(_put, layout.derived[entry.name], work / file, at, meter))
            elif plan.tied_twin and entry.name == plan.tied_twin[0]:
                tasks.append(partial(copy, plain, plan.tied_twin[1], work / file, at))
            else:
                tasks.append(partial(copy, weights, entry.name, work / file, at))
    run_jobs(tasks, jobs, meter)


def _put(data: bytes, path: Path, at: int, meter: Meter) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    meter.add(len(data))


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
    plan: Plan, old: Layout | None, layout: Layout, weights: TensorView, ckpt: Path, like: Path | None, work: Path
) -> tuple[str, ...]:
    """Copy configuration, tokenizer and the rest; what is new of dtypes and files, config.json and the index say.

    Returns the names in a checkpoint's hf/ that were left out: earlier versions imported an adapter's configuration.
    """
    skipped: list[str] = []
    if like:
        sources = [path for path, kept in side_files(like) if kept]
    else:
        there = [path for path in sorted((ckpt / "hf").iterdir()) if path.is_file() and path.name != LAYOUT]
        sources = [path for path in there if not describes_other_weights(path.name)]
        skipped = [path.name for path in there if path not in sources]
    same_files = old is not None and old.weight_map == layout.weight_map
    for path in sources:
        if (work / path.name).exists():
            raise IntegrityError(f"{path} has the name of a weights file; restore the checkpoint's hf/ folder")
        if same_files or path.name != INDEX:
            shutil.copyfile(path, work / path.name)
    dtypes = {weights.dtype(name) for name in plan.hf_shapes}
    stored = {e.dtype for h in old.headers.values() for e in h.entries if e.name in plan.hf_shapes} if old else set()
    if len(dtypes) == 1 and dtypes != stored and (old or DTYPE_NAMES[min(dtypes)] != plan.model.torch_dtype):
        _edit_json(work / "config.json", lambda config: _set_dtype(config, DTYPE_NAMES[min(dtypes)]))
    if not same_files and len(layout.headers) > 1:
        (work / INDEX).write_text(index_text(plan, layout), encoding="utf-8")
    elif layout != old and (work / INDEX).is_file():
        size = sum(header.data_bytes for header in layout.headers.values())
        _edit_json(work / INDEX, lambda index: index.setdefault("metadata", {}).update(total_size=size))
    return tuple(skipped)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, name))


def _edit_json(path: Path, change: Any) -> None:
    """Change a JSON file in place; keys keep their order, the style is Hugging Face's."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
