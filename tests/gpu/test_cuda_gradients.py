"""Every parameter's gradient on one CUDA device against float64, with the attention that CUDA gets by default."""

import os

import pytest
import torch

from megafuse.config.parity import ParityConfig
from megafuse.doctor.parity import parity

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_every_parameter_on_cuda(architecture: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    asked = {"layouts": ("dp", "do"), "architecture": architecture, "seed": seed, "groups": 8}
    cells = parity(ParityConfig.model_validate(asked))
    assert cells and [cell for cell in cells if not cell.ok] == []
