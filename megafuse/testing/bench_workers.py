"""Benchmarks whose model raises: for tests of what is left then."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megafuse.bench import run
from megafuse.config.bench import BenchConfig


@contextmanager
def raising(passes: range, error: Exception, before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In these of its forward passes the model raises `error`, behind its layers as the LM head might, after
    `before()`."""
    engine, numbers = run._Bench._engine, itertools.count()

    def breaks(*args: Any) -> None:
        if next(numbers) in passes:
            before()
            raise error

    def built(self: Any) -> Any:
        found = engine(self)
        found.model[0].register_forward_hook(breaks)
        return found

    run._Bench._engine = built  # type: ignore[method-assign]
    try:
        yield
    finally:
        run._Bench._engine = engine  # type: ignore[method-assign]


def one_rank_breaks(config: BenchConfig, first: int) -> None:
    """`bench`, in which the model of rank 1 alone raises from its forward pass number `first` on."""
    if dist.get_rank() == 1:
        with raising(range(first, 1 << 30), RuntimeError("rank 1 broke")):
            run.bench(config)
    else:
        run.bench(config)
