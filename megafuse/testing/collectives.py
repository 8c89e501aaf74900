"""Functions that tests run on every rank to see the topology's collectives at work."""

from typing import Any


def every_rank_hears_of_rank_zero() -> dict[str, Any]:
    """What this rank got from rank 0: a value, an error, and a sum over the world after the error."""
    import torch

    from megafuse.config.train import ParallelConfig
    from megafuse.errors import ConfigError
    from megafuse.parallel.topology import layout

    def refuse() -> None:
        raise ConfigError("not today")

    with layout(ParallelConfig()) as topology:
        seen: dict[str, Any] = {"rank": topology.rank}
        seen["value"] = topology.on_rank_zero(lambda: f"from {topology.rank}")
        try:
            topology.on_rank_zero(refuse)
        except ConfigError as error:
            seen["error"] = f"{type(error).__name__}: {error}"
        seen["after"] = float(topology.sum_over_world(torch.ones(())))
        return seen


def process_facts(name: str) -> dict[str, Any]:
    """Of this rank: its process, its parent's, and the environment variable `name`."""
    import os

    return {"pid": os.getpid(), "parent": os.getppid(), "variable": os.environ.get(name)}
