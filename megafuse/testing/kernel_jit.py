"""`python -m megafuse.testing.kernel_jit`: kernels launched on an sm_90 that is not there; facts as JSON.

What is launched: the linear log-probs, and the rotary positions of queries and keys.

The host side runs as on CUDA: descriptors, Triton's binder, which decides by the arguments' values what is built anew,
and the compiler. Only the driver is a stand-in: tensors lie on the CPU, and a kernel that has been built is not run.
TRITON_INTERPRET must be unset: in the interpreter nothing is built.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

WIDTH, VOCABULARY = 128, 1280
CHUNK = 4096  # rows whose exponentials fit the workspace: longer sets begin in the middle of a vector
PROPERTIES = {
    "max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536,
    "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
}  # fmt: skip


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return (0, 0, 0, 0, 1024)  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES


class Hopper:
    """Triton's view of a driver with one sm_90, whose tensors are torch's on the CPU."""

    utils = _Utils()

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def launcher_cls(self, *args: Any, **kwargs: Any) -> Any:
        """What launches a built kernel: nothing."""
        return lambda *launched, **options: None


@contextmanager
def hopper(*, compile_them: bool = True) -> Iterator[dict[str, list[int]]]:
    """Inside, kernels are built for sm_90 and not run. Yields shared memory in bytes of each build, by kernel.

    compile_them: False counts what would be built, with 0 bytes each.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from megafuse.kernels import _linear_triton as linear

    found: dict[str, list[int]] = {}
    real_run, real_build = JITFunction.run, JITFunction._do_compile

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return real_run(self, *args, grid=grid, warmup=True, **kwargs)

    def build(self: Any, key: Any, signature: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if compile_them:
            kernel = real_build(self, key, signature, device, *args, **kwargs)
            size = kernel.metadata.shared
        else:
            kernel, size = object(), 0
            self.device_caches[device][0][key] = kernel
        found.setdefault(self.fn.__name__, []).append(size)
        return kernel

    def plan(x: torch.Tensor, weight: torch.Tensor, entropy: bool) -> Any:
        return linear.tiles_for(x.dtype, entropy, linear.aligned(x, weight), major=9, programs=132)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "_do_compile", build),
        mock.patch.object(linear, "plan", plan),
    ):
        before = driver._active  # None where nothing has asked yet: asking raises on a machine without a GPU
        driver.set_active(Hopper())
        try:
            yield found
        finally:
            driver._active = before


def launch(rows: int, *, train: bool) -> None:
    """The kernels of `rows` targets, as a reference's log-probs or as a training step's with its backward."""
    from megafuse.kernels import _linear_triton as linear
    from megafuse.kernels._linear_parts import Workspace
    from megafuse.kernels.logprob import prepare

    weight = torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=train)
    hidden = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, requires_grad=train)
    targets = torch.zeros(rows, dtype=torch.int64)
    space = CHUNK * linear.row_stride(VOCABULARY) * weight.element_size()
    options, _ = prepare(
        hidden, weight, targets, False, torch.arange(rows), 0, None, False, 1.0, None, space, "torch", VOCABULARY,
        "grad",
    )  # fmt: skip
    problem = linear.TritonRows(hidden, weight, targets, options, Workspace())
    problem.logprobs()
    if not train:
        return
    ones = torch.zeros(rows)
    for part in reversed(problem.product.chunks):  # the products between these two are torch's
        problem._bind(part, ones, ones, True, None)
    linear._fold(problem.x, ones, torch.arange(rows), torch.empty(rows, WIDTH))


def launch_rotary(rows: int, *, train: bool) -> None:
    """Queries as they come from mcore, contiguous, and keys, a part of the product of queries, keys and values."""
    from megafuse.kernels._rope_triton import turn

    table = torch.zeros(rows, 1, 1, 64)
    queries, parts = torch.zeros(rows, 1, 8, 64).bfloat16(), torch.zeros(rows, 1, 2, 6 * 64).bfloat16()
    for x in (queries, parts[..., -128:-64]):
        turn(x, table, 1.0)
        if train:
            turn(torch.zeros_like(x).contiguous(), table, -1.0)


def main() -> int:
    """Launch every length as a reference and as a training step; print what was built after each, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="+", help="numbers of targets, in this order")
    parser.add_argument("--count", action="store_true", help="only count what would be built")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: nothing is built in the interpreter", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        after = []
        with hopper(compile_them=not args.count) as found:
            for rows in args.rows:
                for train in (False, True):
                    launch(rows, train=train)
                    launch_rotary(rows, train=train)
                after.append({name: len(sizes) for name, sizes in found.items()})
    print(json.dumps({"builds": after, "shared": {name: max(sizes) for name, sizes in found.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
