"""Silence about what `megafuse doctor` says once and better: absent accelerators, deprecations between dependencies."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_dependencies() -> Iterator[None]:
    """Hide warnings that megatron-core and torch.distributed raise about themselves, inside this block."""
    with warnings.catch_warnings():
        for module in (r"megatron\.", r"torch\.distributed\.", r"torch\.optim\."):
            warnings.filterwarnings("ignore", module=module)
        yield
