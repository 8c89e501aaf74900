"""Faults to inject into a run, for tests that show what happens then."""

from pathlib import Path
from typing import Any


def poison_gradient(config: Any, rank: int, step: int, factor: float = float("nan")) -> dict[str, Any]:
    """Train `config` in the joined world while rank `rank` finds a gradient times `factor` in the `step`-th update.

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
            hook = param.register_hook(lambda gradient: gradient * factor)
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


def flip_bit(config: Any, rank: int, step: int) -> str:
    """Train `config` in the joined world; rank `rank` flips a bit of its final norm after update `step`.

    Returns the error that this rank saw, or nothing. Step 0 flips none.
    """
    import torch
    import torch.distributed as dist

    from megafuse.errors import MegafuseError
    from megafuse.training import loop
    from megafuse.training import run as training_run

    original, count = loop.train_step, [0]

    def flipping(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(engine, *args, **kwargs)
        count[0] += 1
        if count[0] == step and dist.get_rank() == rank:
            param = next(p for n, p in engine.bare[0].named_parameters() if "final_layernorm" in n)
            param.data.view(torch.int32)[0] ^= 1
        return result

    loop.train_step = flipping
    try:
        training_run.train(config)
    except MegafuseError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.train_step = original
    return ""


def break_saves(config: Any, rank: int, saves: tuple[int, ...], how: str) -> dict[str, Any]:
    """Train `config` in the joined world; rank `rank` fails to write the checkpoints with these numbers, from 1.

    how: `limit` (no file above 1000 bytes: EFBIG, as EDQUOT would come), `raise`, `exit` (the writer's process ends
    without a word, and the other ranks' writers take a minute), `kill` and `kill early` (SIGKILL of whoever writes,
    inside a file or before its first byte), `kill late` (of the rank, after its last byte, before the commit), `orphan`
    (of the rank, while its background writer is inside a file). Steps wait for a background writer of this rank.

    Returns `error` (text or empty), and what was `said`, each with the number of steps done by then.
    """
    import os
    import resource
    import time
    from multiprocessing.connection import wait

    import torch.distributed as dist

    from megafuse.checkpoint import saver, writer
    from megafuse.errors import MegafuseError
    from megafuse.training import run as training_run

    count, said, main = [0], list[tuple[int, str]](), os.getpid()
    originals = (saver.plan_save, writer._write_file, saver.Saver.poll, training_run._Run._say, saver.Saver._commit)
    mine = dist.get_rank() == rank

    def now() -> bool:
        return mine and count[0] in saves

    def plan_save(*args: Any) -> Any:
        count[0] += 1
        return originals[0](*args)

    def write_file(transforms: Any, number: int, bucket: Any) -> Any:
        if how == "exit" and count[0] in saves:
            if mine:
                os._exit(17)
            time.sleep(60)
        if not now():
            return originals[1](transforms, number, bucket)
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        if how == "raise":
            return OSError("injected")
        if how == "kill early":
            os.kill(os.getpid(), 9)
        if how in ("kill", "orphan"):
            Path(bucket[0]).write_bytes(b"half a file")
            if how == "kill":
                os.kill(os.getpid(), 9)
            time.sleep(60)
        try:
            return originals[1](transforms, number, bucket)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def poll(self: Any) -> None:
        if self._flight is not None and (mine or how != "exit"):
            if how == "orphan" and now():
                while not list(self._flight.plan.folder.glob("*.distcp")):
                    time.sleep(0.01)
                os.kill(main, 9)
            wait([self._flight.writer._process.sentinel, self._flight.writer._pipe])
        originals[2](self)

    def say(self: Any, text: str) -> None:
        metrics = config.run_dir / "metrics.jsonl"
        said.append((metrics.read_bytes().count(b"\n") if metrics.is_file() else 0, text))

    def commit(self: Any, flight: Any) -> None:
        if how == "kill late" and now():
            if flight.writer is not None:
                flight.writer.wait()
            else:
                writer.write_files(flight.plan, flight.plan.staged())
            os.kill(main, 9)
        originals[4](self, flight)

    saver.plan_save, writer._write_file, saver.Saver.poll = plan_save, write_file, poll  # type: ignore[method-assign]
    training_run._Run._say, saver.Saver._commit = say, commit  # type: ignore[method-assign]
    error = ""
    try:
        training_run.train(config)
    except MegafuseError as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        saver.plan_save, writer._write_file, saver.Saver.poll = originals[:3]  # type: ignore[method-assign]
        training_run._Run._say, saver.Saver._commit = originals[3:]  # type: ignore[method-assign]
    return {"error": error, "said": said}


def break_saves_in_turn(cases: list[tuple[Any, int, tuple[int, ...], str]]) -> list[dict[str, Any]]:
    """`break_saves` for each of several runs: one start of the processes for all."""
    return [break_saves(*case) for case in cases]


def break_saves_alone(config: Any, how: str) -> None:
    """`break_saves` of the second checkpoint in a world of one."""
    from megafuse.parallel.topology import process_groups

    with process_groups():
        break_saves(config, 0, (2,), how)
