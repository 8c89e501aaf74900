"""The pickles of a `torch_dist` checkpoint, read through allow-lists before megatron-core reads them without.

torch.distributed.checkpoint unpickles `.metadata` and stored objects with whatever they name: opening a checkpoint runs
its author's code. Here each is first read by an unpickler that knows the classes of the format and nothing else.

Covered: `.metadata`; `common.pt`; every object (not tensor) inside the `.distcp` files. Not covered: tensors, which
torch itself reads with `weights_only`; a folder that is changed between this check and the reading.
"""

import io
import os
from pathlib import Path
from typing import Any

import torch

from megafuse.converters.dcp_reader import read_metadata
from megafuse.converters.safetensors_io import plain_name
from megafuse.errors import DataError, IntegrityError


def refuse_unknown_pickles(folder: Path) -> None:
    """Read every pickle of the checkpoint `folder` through an allow-list.

    Raises:
        IntegrityError: one names a class that no checkpoint needs, is damaged, or is not where `.metadata` says.
    """
    metadata = read_metadata(folder)
    _weights_only(folder / "common.pt", (folder / "common.pt").read_bytes())
    for index, info in metadata.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise IntegrityError(f"{folder}: {index.fqn} is stored transformed, which megafuse never does")
        if not hasattr(metadata.state_dict_metadata.get(index.fqn), "chunks"):  # an object, not a tensor
            try:
                file = folder / plain_name(info.relative_path, f"{folder}/.metadata")
            except DataError as error:
                raise IntegrityError(str(error)) from None
            _weights_only(f"{file} ({index.fqn})", _slice(file, info.offset, info.length))


def _slice(file: Path, offset: int, length: int) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read ({error}); restore the checkpoint") from None
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _weights_only(where: Any, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).strip().splitlines()
        told = next((line.strip() for line in reason if "GLOBAL" in line or "nsupported" in line), reason[:1])
        raise IntegrityError(f"{where} is not plain data: {told}; do not trust this checkpoint") from None
