"""Where Triton kernels are tested: compiled on a CUDA device if there is one, else in the interpreter on the CPU."""

import random
from typing import Any

import pytest
import torch

from megafuse.kernels.backend import interpreted


@pytest.fixture
def device(record_property: Any) -> torch.device:
    """A device that Triton kernels run on; torch is seeded freshly, and the seed is shown when a test fails."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and not interpreted():
        pytest.skip("no CUDA device, and Triton was imported without TRITON_INTERPRET=1")
    seed = random.SystemRandom().randrange(2**31)
    record_property("seed", seed)
    print("seed", seed)
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
