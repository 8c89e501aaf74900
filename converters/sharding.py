"""New weights files for an export: as many as it takes, named and filled as transformers' `save_pretrained` does."""

import json
from typing import Any

from megafuse.converters.layout import Layout
from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import SINGLE, make_header
from megafuse.converters.views import TensorView, itemsize, tensor_bytes

DEFAULT_SHARD_GB = 5.0


def resharded(plan: Plan, old: Layout | None, weights: TensorView, max_bytes: int) -> Layout:
    """Files of at most `max_bytes` (a larger tensor has one for itself) for all weights, in the order of their names.

    old: the layout of the source, where there is one: what it has beside the weights (a stored twin of a tied
    embedding, old buffers) and the metadata of its first file are kept.
    """
    entries = [entry for header in old.headers.values() for entry in header.entries] if old else []
    metadata = next(iter(old.headers.values())).metadata if old else {"format": "pt"}
    tensors = {name: (weights.dtype(name), shape) for name, shape in plan.hf_shapes.items()}
    for entry in entries:
        if plan.tied_twin and entry.name == plan.tied_twin[0]:
            tensors[entry.name] = tensors[plan.tied_twin[1]]
        tensors.setdefault(entry.name, (entry.dtype, entry.shape))

    def in_file(name: str) -> tuple[int, str, str]:
        dtype = tensors[name][0]
        return -itemsize(dtype), dtype, name  # safetensors: the widest elements first, so that all are aligned

    files = _fill({name: tensor_bytes(*tensors[name]) for name in sorted(tensors, key=_natural)}, max_bytes)
    number = f"-of-{len(files):05d}.safetensors"
    names = [SINGLE] if len(files) == 1 else [f"model-{i:05d}{number}" for i in range(1, len(files) + 1)]
    headers = {
        file: make_header([(name, *tensors[name]) for name in sorted(held, key=in_file)], metadata)
        for file, held in zip(names, files)
    }
    return Layout(headers, old.derived if old else {})


def index_text(plan: Plan, layout: Layout) -> str:
    """What `model.safetensors.index.json` says of several files, as transformers writes it."""
    size = sum(header.data_bytes for header in layout.headers.values())
    fields: dict[str, Any] = {
        "metadata": {"total_parameters": plan.parameters, "total_size": size},
        "weight_map": layout.weight_map,
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _fill(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """The names of each file. A tensor that is too large for any file goes before the one that is being filled."""
    files: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if size > max_bytes:
            files.append([name])
            continue
        if filled + size > max_bytes:
            files.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    return files + ([current] if current else [])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: layer 10 comes after layer 2."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
