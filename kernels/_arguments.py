"""Checks of the arguments that the log-prob functions share. Tensors' values are looked at on a CPU only."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.errors import ConfigError, DataError
from megafuse.kernels._vocab_softmax import Head

INDEX_TYPES = (torch.int32, torch.int64)
FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SMALLEST = torch.finfo(torch.float32).tiny  # 2^-126: it and its reciprocal are float32 numbers


def positive(name: str, value: Any, otherwise: str = "") -> float:
    """A factor that kernels use in float32, and its reciprocal; ConfigError where one of them is not finite."""
    if not isinstance(value, Real) or not _SMALLEST <= float(value) <= 1 / _SMALLEST:
        raise ConfigError(f"{name}={value!r} must be a finite number above 0 (2^-126 to 2^126){otherwise}")
    return float(value)


def whole(name: str, value: Any, least: int, otherwise: str = "") -> int:
    """An integer, or a float that is one (1e9), of at least `least`; ConfigError otherwise."""
    number = isinstance(value, Integral) and not isinstance(value, bool)
    if not (number or (isinstance(value, float) and value.is_integer())) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}{otherwise}")
    return int(value)


def make_head(
    columns: int,
    start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    temperature: float,
    softcap: float | None,
) -> Head:
    """The `Head` of a shard with `columns` ids. ConfigError on numbers that cannot work."""
    start = whole("vocab_start", start, 0)
    temperature = positive("temperature", temperature)
    softcap = None if softcap is None else positive("softcap", softcap, ", or None for no soft cap")
    if vocab_size is not None:
        vocab_size = whole("vocab_size", vocab_size, 1, ", or None where no column is padding")
    valid = columns if vocab_size is None else min(max(vocab_size - start, 0), columns)
    return Head(start, valid, temperature, softcap, group if group is not None and group.size() > 1 else None)


def check_tensors(targets: Tensor, **floats: Tensor) -> None:
    """Refuse ids that are no integers, types that the kernels do not compute with, and tensors on different devices."""
    if targets.dtype not in INDEX_TYPES:
        raise ConfigError(f"targets are {targets.dtype}: token ids must be int64 or int32")
    for name, tensor in floats.items():
        if tensor.dtype not in FLOAT_TYPES:
            raise ConfigError(f"{name} is {tensor.dtype}: cast it to bfloat16, float16, float32 or float64")
        if tensor.device != targets.device:
            raise ConfigError(f"{name} is on {tensor.device} but targets are on {targets.device}: move one of them")


def check_targets(targets: Tensor, head: Head, vocab_size: int | None) -> None:
    """Refuse ids outside the vocabulary where this rank alone can tell; all ranks decide alike, so none hangs.

    Without a group the vocabulary is this rank's columns, however much larger `vocab_size` may be.
    """
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(targets))
    size = vocab_size if head.group is not None else head.start + head.columns
    floor = head.start if head.group is None else 0
    if low < floor or (size is not None and high >= size):
        bad = low if low < floor else high
        shards = "of all shards" if size is None else f"of {size} ids"
        raise DataError(
            f"target id {bad} is outside the vocabulary {shards} (from {floor}): "
            f"correct targets, vocab_start or vocab_size"
        )


def owned_somewhere(logp: Tensor, targets: Tensor, head: Head) -> Tensor:
    """`logp`; ids that no rank owns are refused: they are known after the collective, on all ranks alike."""
    if head.group is not None and logp.device.type == "cpu" and bool((logp == -torch.inf).any()):
        bad = int(targets[logp == -torch.inf][0])
        raise DataError(
            f"target id {bad} has log-prob -inf: no rank's vocabulary shard holds it, or its logit is -inf; "
            f"correct targets, vocab_start or vocab_size"
        )
    return logp
