"""What a command imports before it works: ranks pay for it at every start."""

import subprocess
import sys

import pytest
import torch

from megafuse.parallel.cpu_runtime import compile_when_called

LOOK = """
import sys
from megafuse.parallel.cpu_runtime import compile_when_called
from megafuse.parallel.quiet import quiet_dependencies

with quiet_dependencies(), compile_when_called():
    import megafuse.model.spec
    import megafuse.training.run
print(sorted({"torch._inductor.compile_fx", "transformers", "datasets", "pandas", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA megatron-core's fused functions are compiled at once")
def test_a_rank_imports_neither_a_compiler_nor_what_reads_other_formats() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled at once")
def test_what_is_decorated_is_compiled_once_and_when_it_is_called() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    with compile_when_called():

        @torch.compile(backend=backend)
        def doubled(x: torch.Tensor) -> torch.Tensor:
            """Twice x."""
            return 2 * x

        plain = torch.compile(lambda x: x + 1, backend=backend)
    assert torch.compile is real and not graphs and doubled.__doc__ == "Twice x."
    x = torch.randn(3)
    for _ in range(2):
        assert torch.equal(doubled(x), 2 * x)
    assert len(graphs) == 1 and torch.equal(plain(x), x + 1) and len(graphs) == 2
