"""Where tests run: Triton's interpreter without a GPU, and the files that take longest first."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton must be told before anything imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files that keep a process busy for a minute or more, longest first: begun last, one of them would leave the other
# process of `make test` idle at the end. The order is all that counts; a file that is not here comes after these.
LONGEST = (
    "slurm/test_slurm.py",
    "distributed/test_gradients.py",
    "slurm/test_launch.py",
    "e2e/test_launch_sweep.py",
    "e2e/test_smollm2.py",
    "distributed/test_families.py",
    "distributed/test_parity.py",
    "e2e/test_pipeline.py",
    "faults/test_resume.py",
    "faults/test_guards.py",
    "faults/test_allow_change.py",
    "faults/test_allow_change.py",
    "distributed/test_relayout.py",
    "kernels/test_logprob_tp.py",
    "kernels/test_triton_aot.py",
    "kernels/test_triton_linear.py",
    "kernels/test_group_loss.py",
    "unit/test_launch.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONGEST)}
    if missing := [str(path) for path in place if not path.is_file()]:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names {', '.join(missing)}, which there is not")
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))  # stable: a file's tests keep their order
