"""One CUDA device against the float64 oracle: the same losses and bounds that the CPU tests use, NCCL underneath."""

import os
from pathlib import Path

import pytest
import torch

from megafuse.testing.gpu_check import TOLERANCE, check
from megafuse.testing.parity import LOSSES, Lab

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(Path(tmp_path_factory.mktemp("gpu")), int.from_bytes(os.urandom(4), "little")).prepare()


@pytest.mark.parametrize("loss", LOSSES)
def test_fp32_on_cuda_equals_the_oracle(lab: Lab, loss: str) -> None:
    found = check(lab, loss, "fp32", "torch")
    assert max(found.values()) <= TOLERANCE["fp32"], found
