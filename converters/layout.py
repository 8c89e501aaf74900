"""layout.json: how the weights of the Hugging Face folder lay in files.

A checkpoint keeps every safetensors header as it was, so that an export is the same to the byte whoever wrote the
original, and the few buffers that follow from the configuration.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafuse.converters.plan import Plan
from megafuse.converters.safetensors_io import Header, SafetensorsFolder, parse_header, plain_name
from megafuse.errors import IntegrityError

LAYOUT = "layout.json"
_FORMAT = "megafuse-layout/1"


@dataclass(frozen=True)
class Layout:
    """Headers by file name, and the bytes of derived tensors by name."""

    headers: dict[str, Header]
    derived: dict[str, bytes]

    @property
    def weight_map(self) -> dict[str, str]:
        """File name by tensor name."""
        return {entry.name: file for file, header in self.headers.items() for entry in header.entries}

    def to_json(self) -> dict[str, Any]:
        """What layout.json holds."""
        files = [{"name": name, "header": header.text} for name, header in self.headers.items()]
        derived = {name: base64.b64encode(data).decode() for name, data in self.derived.items()}
        return {"format": _FORMAT, "files": files, "derived": derived}


def layout_of(plan: Plan, shards: SafetensorsFolder) -> Layout:
    """The layout of an open Hugging Face folder."""
    derived = {name: shards.read_all(name) for name in shards.names() if plan.is_derived(name)}
    return Layout(dict(shards.headers), derived)


def read_layout(folder: Path, plan: Plan) -> Layout:
    """Read `folder/layout.json` and compare it with the plan: every HF tensor in exactly one file, right shapes.

    Raises IntegrityError where it is missing, damaged or of another model; DataError for a name that leaves the folder.
    """
    path = folder / LAYOUT
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        files = [(plain_name(f["name"], str(path)), str(f["header"])) for f in fields["files"]]
        derived = {str(name): base64.b64decode(data) for name, data in fields["derived"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise IntegrityError(f"{path} cannot be read ({error!r}); restore the checkpoint's hf/ folder") from None
    layout = Layout({name: parse_header(text, f"{path}: {name}") for name, text in files}, derived)
    twin = plan.tied_twin[0] if plan.tied_twin else None
    seen: set[str] = set()
    for entry in (e for header in layout.headers.values() for e in header.entries):
        shape = plan.hf_shapes.get(plan.tied_twin[1] if entry.name == twin and plan.tied_twin else entry.name)
        known = len(derived[entry.name]) == entry.size if entry.name in derived else entry.shape == shape
        if entry.name in seen or not known:
            raise IntegrityError(
                f"{path}: {entry.name} {list(entry.shape)} does not fit config.json (or is there twice)"
            )
        seen.add(entry.name)
    if missing := sorted(set(plan.hf_shapes) - seen):
        raise IntegrityError(f"{path}: {len(missing)} tensors are in no file, first {missing[0]}")
    return layout
