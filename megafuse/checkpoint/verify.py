"""Checkpoints are believed after their bytes have been hashed, by all ranks together, and their pickles looked into.

All of it happens before a byte reaches a parameter, and every rank comes to the same answer: a checkpoint that one rank
loads and another refuses would hang the job.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megafuse.checkpoint import folder as folders
from megafuse.checkpoint.pickles import refuse_unknown_pickles
from megafuse.errors import IntegrityError
from megafuse.observe.manifest import file_sha256
from megafuse.parallel.topology import Topology


def newest_trusted(root: Path, topology: Topology, *, strict: bool, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` that passes `verify`; None where there is none at all. Collective.

    One that does not pass is set aside as `NAME.damaged`, with the reason told to `say`, and the next older is tried.

    Raises:
        IntegrityError: with `strict`, the first that does not pass; else, that there are some and none passes.
    """
    steps = topology.on_rank_zero(lambda: folders.complete_steps(root))
    for step in reversed(steps):
        candidate = root / folders.step_name(step)
        try:
            verify(candidate, topology)
        except IntegrityError as error:
            if strict:
                raise IntegrityError(f"{error}\ncheckpoint.strict = false falls back to an older checkpoint") from None
            aside = topology.on_rank_zero(lambda: folders.set_aside(candidate))  # noqa: B023 (called at once)
            say(f"checkpoint {candidate.name} is not used, and is now {aside.name}: {error}")
            continue
        if step != steps[-1]:
            say(f"going on from {candidate.name}, {steps[-1] - step} steps before the newest, {steps[-1]}")
        return candidate
    if steps:
        raise IntegrityError(
            f"none of the {len(steps)} checkpoints in {root} can be trusted; restore one, or begin anew in another "
            "run_dir"
        )
    return None


def verify(folder: Path, topology: Topology) -> None:
    """Check every byte of the checkpoint `folder` against its manifest, and its pickles. Collective.

    Every rank hashes a share of the files. A file without a hash in the manifest is checked by its size alone.

    Raises:
        IntegrityError: on every rank, with the same message.
    """
    files: dict[str, Any] = topology.on_rank_zero(lambda: _listed(folder))
    shares = _balanced({name: int(known["bytes"]) for name, known in files.items()}, topology.world_size)
    found = topology.gather_on_rank_zero(_hash_or_error(folder, shares[topology.rank]))

    def compare() -> None:
        for digests in found or []:
            for name, digest in digests.items():
                known = files[name].get("sha256")
                if known is not None and digest != known:
                    raise IntegrityError(
                        f"{folder / name} has SHA-256 {digest}, its manifest says {known}: its bytes have changed "
                        "since it was written; restore the checkpoint"
                    )
        refuse_unknown_pickles(folder)

    topology.on_rank_zero(compare)


def _listed(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = folders.read_manifest(folder)["files"]
    for name in (".metadata", "common.pt"):
        if name not in files:
            raise IntegrityError(f"{folder / 'manifest.json'} does not list {name}; restore the checkpoint")
    return files


def _balanced(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Names dealt so that every rank has about as many bytes: largest first, each to the one with the least."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def _hash_or_error(folder: Path, names: list[str]) -> dict[str, str]:
    """A digest, or what went wrong instead of one: an exception on one rank would leave the others waiting."""
    found = {}
    for name in names:
        try:
            found[name] = file_sha256(folder / name)
        except OSError as error:
            found[name] = f"unreadable ({error})"
    return found
