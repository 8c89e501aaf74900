"""Faults to inject into a run, for tests that show what happens then."""

from pathlib import Path
from typing import Any


def poison_gradient(
    config: Any, rank: int, step: int, factor: float = float("nan"), *, reduced: bool = False
) -> dict[str, Any]:
    """Train `config` in the joined world while rank `rank` finds a gradient times `factor` in the `step`-th update.

    Before gradients are summed over the ranks, or with `reduced` after it: then in this rank's copy alone.
    Returns what this rank saw: `error` (text or None) and whether its parameters changed in that step.
    """
    import torch
    import torch.distributed as dist

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
            if reduced:
                kwargs["check"] = lambda outputs, again: param.main_grad.mul_(factor) is not None and outputs
            else:
                hook = param.register_hook(lambda gradient: gradient * factor)
        result = train_step(engine, *args, **kwargs)
        if hook is not None:
            hook.remove()
        after = engine.bare[0].parameters()
        seen["changed"] = not all(torch.equal(a, b) for a, b in zip(before, after))
        return result

    seen["error"] = error_with_step(config, poisoned) or None
    return seen


def error_with_step(config: Any, train_step: Any) -> str:
    """Train `config` in the joined world with another `train_step`; the error that this rank saw, or nothing."""
    from megafuse.errors import MegafuseError
    from megafuse.training import loop
    from megafuse.training import run as training_run

    original, loop.train_step = loop.train_step, train_step
    try:
        training_run.train(config)
    except MegafuseError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.train_step = original
    return ""


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


def flip_bit(config: Any, rank: int, step: int) -> str:
    """Train `config` in the joined world; rank `rank` flips a bit of its final norm after update `step`.

    Returns the error that this rank saw, or nothing. Step 0 flips none.
    """
    import torch
    import torch.distributed as dist

    from megafuse.training.step import train_step

    count = [0]

    def flipping(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = train_step(engine, *args, **kwargs)
        count[0] += 1
        if count[0] == step and dist.get_rank() == rank:
            param = next(p for n, p in engine.bare[0].named_parameters() if "final_layernorm" in n)
            param.data.view(torch.int32)[0] ^= 1
        return result

    return error_with_step(config, flipping)


def glitches(rank: int, runs: list[tuple[Any, int, str]]) -> list[str]:
    """Train each config of `runs` (config, step, where) in the joined world; rank `rank` computes one thing wrong once.

    In update `step` (0: none) a bit of what the embedding gives (`where` = forward) or of a gradient (backward) is
    flipped. Returns the error that this rank saw in each run, or nothing.
    """
    return [error_with_step(config, _wrong_once(rank, step, where)) for config, step, where in runs]


def _wrong_once(rank: int, step: int, where: str) -> Any:
    import torch
    import torch.distributed as dist

    from megafuse.training.step import train_step

    count = [0]
    hooks: list[Any] = []

    def flipped(value: torch.Tensor) -> torch.Tensor:
        hooks.pop().remove()
        bits = value.detach().clone()
        bits.view(torch.int32).view(-1)[0] ^= 1 << 22  # the highest of the mantissa: rounding must not hide it
        return bits if where == "backward" else value + (bits - value).detach()

    def wrong(engine: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == step and dist.get_rank() == rank:
            model = engine.bare[0]
            if where == "forward":
                hooks.append(model.embedding.register_forward_hook(lambda module, inputs, output: flipped(output)))
            else:
                hooks.append(model.decoder.layers[0].mlp.linear_fc2.weight.register_hook(flipped))
        return train_step(engine, *args, **kwargs)

    return wrong


def spoil_states(cases: list[tuple[Any, int, int, str]]) -> list[str]:
    """Train each (config, rank, step, what) in turn in the joined world; `rank`'s state is spoilt once, after `step`.

    what: a `weight` of the final norm becomes NaN, its `master` weight in fp32 or its first `moment` infinite; with
    `stop` all ranks are asked to stop in that step too, and their weight is NaN. Returns the error of each, or nothing.
    """
    return [error_with_step(config, _spoiled_once(rank, step, what)) for config, rank, step, what in cases]


def _spoiled_once(rank: int, step: int, what: str) -> Any:
    import os
    import signal

    import torch.distributed as dist

    from megafuse.training.step import train_step

    count = [0]

    def spoiling(engine: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == step and what == "stop":
            os.kill(os.getpid(), signal.SIGUSR1)
        result = train_step(engine, *args, **kwargs)
        if count[0] != step or dist.get_rank() != rank:
            return result
        if what in ("weight", "stop"):
            param = next(p for n, p in engine.bare[0].named_parameters() if "final_layernorm" in n)
            param.data[0] = float("nan")
            return result
        (part,) = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
        main = next(p for group in part.optimizer.param_groups for p in group["params"] if p.numel())
        target = main.data if what == "master" else part.optimizer.state[main]["exp_avg"]
        target.view(-1)[0] = float("inf")
        return result

    return spoiling
