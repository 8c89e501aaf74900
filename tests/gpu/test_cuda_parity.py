"""One CUDA device against the float64 oracle: the same losses and bounds that the CPU tests use, NCCL underneath."""

import os
from pathlib import Path

import pytest
import torch

from megafuse.model.arch import read_arch
from megafuse.model.build import choose_backend
from megafuse.testing.gpu_check import TOLERANCE, check
from megafuse.testing.parity import LOSSES, Lab

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(Path(tmp_path_factory.mktemp("gpu")), int.from_bytes(os.urandom(4), "little")).prepare()


def test_the_checks_train_with_flex(lab: Lab) -> None:
    config = lab.config("sft", "unused")
    head_dim = read_arch(config.model.path).head_dim
    assert choose_backend(config.model, head_dim=head_dim, prefix_sharing=True).attention == "flex"


@pytest.mark.parametrize("loss", LOSSES)
def test_fp32_on_cuda_equals_the_oracle(lab: Lab, loss: str) -> None:
    found = check(lab, loss, "fp32", "torch")
    assert max(found.values()) <= TOLERANCE["fp32"], found
