"""What a run on CUDA asks of megatron-core, on a CPU: its process groups, its fused kernels and NCCL's overlaps."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, layouts have no gloo twins of their groups, and models and engines are set up as on CUDA.

    The numbers are still gloo's and the CPU's: what only a device computes is left to tests/gpu.
    """
    from megatron.core import parallel_state

    from megafuse.model import build
    from megafuse.parallel import policy

    real_groups, real_config = parallel_state.initialize_model_parallel, build.transformer_config

    def without_gloo(*args: Any, **kwargs: Any) -> Any:
        return real_groups(*args, **{**kwargs, "create_gloo_process_groups": False})

    def fused(arch: Any, *args: Any, **kwargs: Any) -> Any:
        config = real_config(arch, *args, **kwargs)
        config.bias_activation_fusion, config.bias_dropout_fusion = arch.activation == "silu", True
        return config

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo))
        stack.enter_context(mock.patch.object(build, "transformer_config", fused))
        stack.enter_context(mock.patch.dict(policy.TABLE, {"gloo": policy.TABLE["nccl"]}))
        yield
