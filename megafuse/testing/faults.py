"""Faults to inject into a run, for tests that show what happens then."""

from pathlib import Path
from typing import Any


def poison_gradient(config: Any, rank: int, step: int) -> dict[str, Any]:
    """Train `config` in the joined world while rank `rank` finds a NaN gradient in optimizer step `step` (from 1).

    Returns what this rank saw: `error` (text or None) and whether its parameters changed in that step.
    """
    import torch
    import torch.distributed as dist

    from megafuse.errors import MegafuseError
    from megafuse.training import loop as training_loop
    from megafuse.training import run as training_run
    from megafuse.training.step import train_step

    seen: dict[str, Any] = {"error": None, "changed": None, "step": 0}

    def poisoned(engine: Any, *args: Any, **kwargs: Any) -> Any:
        seen["step"] += 1
        if seen["step"] != step:
            return train_step(engine, *args, **kwargs)
        before = [p.detach().clone() for p in engine.bare[0].parameters()]
        hook = None
        if dist.get_rank() == rank:
            param = next(p for p in engine.bare[0].parameters() if p.requires_grad)
            hook = param.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        result = train_step(engine, *args, **kwargs)
        if hook is not None:
            hook.remove()
        after = engine.bare[0].parameters()
        seen["changed"] = not all(torch.equal(a, b) for a, b in zip(before, after))
        return result

    original, training_loop.train_step = training_loop.train_step, poisoned
    try:
        training_run.train(config)
    except MegafuseError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    finally:
        training_loop.train_step = original
    return seen


def die(rank: int) -> None:
    """Kill the process of rank `rank` the hard way; the others wait for it in a collective."""
    import os
    import signal

    import torch.distributed as dist

    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def find_newest(roots: list[Path], stricts: list[bool]) -> list[dict[str, Any]]:
    """In the joined world, for each folder of checkpoints: what `newest_trusted` found, its error, what it said."""
    from megafuse.checkpoint.verify import newest_trusted
    from megafuse.config.train import ParallelConfig
    from megafuse.errors import IntegrityError
    from megafuse.parallel.topology import layout

    results = []
    with layout(ParallelConfig()) as topology:
        for root, strict in zip(roots, stricts):
            said: list[str] = []
            found, error = None, ""
            try:
                found = newest_trusted(root, topology, strict=strict, say=said.append)
            except IntegrityError as caught:
                error = str(caught)
            results.append({"found": found and found.name, "error": error, "said": "\n".join(said)})
            topology.barrier()
    return results
