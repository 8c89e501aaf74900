"""Transformer Engine multiplies fp32 matrices in TF32; cuBLAS reads this, once, when it is first used."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


@pytest.fixture(autouse=True)
def compiled_or_failed() -> Iterator[None]:
    """What torch compiles too often would go on uncompiled, and a test of it would test something else."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
