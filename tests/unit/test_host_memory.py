"""What is freed goes back to the system."""

import os
import platform
from pathlib import Path

import pytest
import torch

from megafuse.parallel.host_memory import give_back_freed_memory


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA is, nothing is given back")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator keeps what lies below its top")
def test_freed_tensors_below_a_living_one_go_back() -> None:
    pieces = [torch.ones(4096) for _ in range(8192)]  # 16 KiB each: from the heap, not mapped one by one
    top = torch.ones(4096)
    before = resident()
    del pieces
    kept = resident()
    assert give_back_freed_memory()
    assert resident() < min(kept, before) - 64 * 2**20
    assert float(top.sum()) == 4096
