"""One number for a set of weights, whatever folder, sharding or parallel layout holds them.

sha256 over the HF view: for every HF tensor in name order its name, dtype, shape and the sha256 of its bytes. A tied
output layer and buffers that follow from the configuration are not weights and do not count.
"""

import hashlib
import json
import os
from pathlib import Path

from megafuse.converters.folders import MANIFEST, is_checkpoint, open_weights, read_manifest
from megafuse.converters.plan import Plan
from megafuse.converters.views import DEFAULT_BLOCK, TensorView, stream, tensor_bytes
from megafuse.errors import IntegrityError
from megafuse.observe.manifest import write_json_atomic


class WeightsHasher:
    """Collects the digest while tensors are copied, each tensor's bytes in order, tensors in any order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._hashes = {name: hashlib.sha256() for name in plan.hf_shapes}
        self._bytes = dict.fromkeys(plan.hf_shapes, 0)

    def add(self, name: str, data: memoryview) -> None:
        """The next bytes of HF tensor `name`."""
        self._hashes[name].update(data)
        self._bytes[name] += len(data)

    def finish(self, view: TensorView) -> str:
        """The digest, as 64 hexadecimal digits. Raises IntegrityError where not every byte was added exactly once."""
        whole = hashlib.sha256()
        for name in sorted(self._plan.hf_shapes):
            shape, dtype = self._plan.hf_shapes[name], view.dtype(name)
            expected = tensor_bytes(dtype, shape)
            if self._bytes[name] != expected:
                raise IntegrityError(f"{name}: {self._bytes[name]} of {expected} bytes were copied")
            whole.update(json.dumps([name, dtype, list(shape), self._hashes[name].hexdigest()]).encode() + b"\n")
        return whole.hexdigest()


def weights_digest(path: str | Path, *, block_mb: int = DEFAULT_BLOCK >> 20) -> str:
    """The digest of a Hugging Face folder or of any checkpoint; reads every weight, one block in memory.

    Raises ConfigError, UnsupportedModelError or IntegrityError where the folder is not what its configuration says.
    """
    with open_weights(path) as (plan, view):
        hasher, buffer = WeightsHasher(plan), bytearray(block_mb << 20)
        for name in plan.hf_shapes:
            for block in stream(view, name, buffer):
                hasher.add(name, block)
        return hasher.finish(view)


def cached_digest(path: str | Path, *, store: bool = True) -> str:
    """`weights_digest`, taken from the checkpoint's manifest where it is there, and put there where it was not.

    The manifest is believed after the sizes of its files have been checked; `verify_files` checks the bytes.
    store: False leaves the folder as it is; a folder that may not be written is left as it is too.
    """
    folder = Path(path)
    manifest = read_manifest(folder) if is_checkpoint(folder) else None
    if manifest and isinstance(manifest.get("weights_sha256"), str):
        return str(manifest["weights_sha256"])
    digest = weights_digest(folder)
    if manifest and store and os.access(folder, os.W_OK):
        write_json_atomic(folder / MANIFEST, {**manifest, "weights_sha256": digest})
    return digest
