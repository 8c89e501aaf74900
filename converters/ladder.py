"""`megafuse convert verify`: is this checkpoint that model? Five rungs, each of which the one below cannot see.

    plan    names and shapes of both folders, from headers: every byte on one side is exactly one byte on the other
    bits    file hashes of the manifest, and every weight bit by bit
    load    megatron-core loads the checkpoint at a matrix of layouts: every parameter of every rank is the folder's
    save    what megatron-core saves from each layout has the same weights
    logits  fp32 logits at each layout against transformers', past the window and the knee of the rope scaling

The first four pass on a model that is wrong: an epsilon, a window, a cap live in the configuration.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from megafuse.converters.digest import weights_digest
from megafuse.converters.folders import is_checkpoint, open_weights
from megafuse.converters.logits import TOLERANCE, default_tokens, describe, huggingface_logits, random_tokens
from megafuse.converters.rungs import LayoutFacts, climb
from megafuse.converters.verify import verify
from megafuse.converters.views import DEFAULT_BLOCK
from megafuse.errors import ConfigError, IntegrityError, MegafuseError
from megafuse.model.arch import ModelArch, read_arch
from megafuse.parallel.layouts import parse_layout, problems

RUNGS = ("plan", "bits", "load", "save", "logits")
MOST_RANKS = 16  # processes that a named layout may take here


@dataclass(frozen=True)
class Finding:
    """One line of the verdict: a rung, the layout where there is one, whether it held, and what was seen."""

    rung: str
    layout: str
    ok: bool
    detail: str


def verify_ladder(
    one: str | Path,
    other: str | Path,
    *,
    layouts: Sequence[str] = (),
    upto: str = "logits",
    tokens: int | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    block_mb: int = DEFAULT_BLOCK >> 20,
    show: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Climb as far as `upto`, or to the end of the first rung that does not hold. Of the folders one is a checkpoint.

    layouts: names such as `tp2-pp2`; none given: `default_layouts`. Each takes as many processes as it needs.
    tokens: length of the sequence of the last rung; None: past what the model's window and rope scaling need.
    Needs the memory of the model in fp32 from `load` on, and its disk space in the temporary folder for `save`.
    Raises ConfigError for a folder, rung or layout that cannot be.
    """
    for name in layouts:
        parse_layout(name)  # a typo costs nothing, not a comparison of every bit
    ckpt, hf_dir = _tell_apart(Path(one), Path(other))
    if upto not in RUNGS:
        raise ConfigError(f"upto = {upto!r} is not one of {', '.join(RUNGS)}")
    found: list[Finding] = []
    for finding in _climb(ckpt, hf_dir, layouts, RUNGS[: RUNGS.index(upto) + 1], tokens, seed, tolerance, block_mb):
        found.append(finding)
        if show:
            show(finding)
    return found


def _tell_apart(one: Path, other: Path) -> tuple[Path, Path]:
    for folder in (one, other):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; fix: give a checkpoint and a Hugging Face folder")
    kinds = is_checkpoint(one), is_checkpoint(other)
    if kinds[0] == kinds[1]:
        what = "checkpoints" if kinds[0] else "Hugging Face folders (no .metadata)"
        raise ConfigError(f"{one} and {other} are both {what}; fix: give one of each")
    return (one, other) if kinds[0] else (other, one)


def _climb(
    ckpt: Path,
    hf_dir: Path,
    layouts: Sequence[str],
    rungs: Sequence[str],
    tokens: int | None,
    seed: int,
    tolerance: float,
    block_mb: int,
) -> Iterator[Finding]:
    finding = _guarded("plan", partial(same_plan, ckpt, hf_dir))
    yield finding
    if not finding.ok or "bits" not in rungs:
        return
    arch = read_arch(ckpt)
    # a layout that this model cannot have is refused before every bit is read
    worlds = _by_world(arch, layouts or default_layouts(arch)) if "load" in rungs else {}
    finding = _guarded("bits", partial(_same_bits, ckpt, hf_dir, block_mb))
    yield finding
    if not finding.ok or "load" not in rungs:
        return
    with tempfile.TemporaryDirectory() as folder:
        ids, theirs = None, None
        if "logits" in rungs:
            ids, theirs = random_tokens(arch, tokens or default_tokens(arch), seed), Path(folder) / "logits.pt"
            torch.save(huggingface_logits(hf_dir, ids), theirs)
        saved = Path(folder) / "saved" if "save" in rungs else None
        facts: list[LayoutFacts] = []
        for world, names in worlds.items():
            try:
                found = _at_world(world, (ckpt, hf_dir, names, None if ids is None else ids.tolist(), theirs, saved))
            except MegafuseError as error:
                yield Finding("load", ", ".join(names), False, str(error))
                return
            facts += found
            yield from map(_loaded, found)
        if any(fact.wrong or fact.direct for fact in facts):
            return
        again = [(fact.layout, partial(_resaved, saved / fact.layout, ckpt)) for fact in facts if saved]
        resaved = [_guarded("save", check, name) for name, check in again]
        yield from resaved
        if all(finding.ok for finding in resaved):
            yield from (_computed(fact, tolerance) for fact in facts if theirs)


def _guarded(rung: str, check: Callable[[], str], layout: str = "") -> Finding:
    try:
        return Finding(rung, layout, True, check())
    except MegafuseError as error:
        return Finding(rung, layout, False, str(error))


def same_plan(ckpt: Path, hf_dir: Path) -> str:
    """Compare the configurations, names and shapes of both; says how much there is.

    Raises IntegrityError naming the fields that differ, or as `open_weights` does.
    """
    with open_weights(ckpt) as (plan, _), open_weights(hf_dir) as (other, _):
        mine, theirs = plan.model, other.model
        differ = [
            f"{f.name} {getattr(mine, f.name)} and {getattr(theirs, f.name)}"
            for f in fields(ModelArch)
            if f.name != "torch_dtype" and getattr(mine, f.name) != getattr(theirs, f.name)
        ]
        if differ:
            raise IntegrityError(f"{ckpt} and {hf_dir} are different models: {'; '.join(differ)}")
        return f"{mine.architecture}: {len(other.hf_shapes)} tensors, {plan.parameters:,} parameters, one to one"


def _same_bits(ckpt: Path, hf_dir: Path, block_mb: int) -> str:
    report = verify(ckpt, hf_dir, block_mb=block_mb)
    beside = f"; beside the weights differ: {', '.join(report.side_files_differ)}" if report.side_files_differ else ""
    unhashed = f"; no hash, sizes only: {', '.join(report.unhashed)}" if report.unhashed else ""
    return (
        f"{report.files} files match their hashes, {report.tensors} tensors are equal in every bit"
        f"{unhashed}{beside}; weights sha256 {report.weights_sha256}"
    )


def default_layouts(arch: ModelArch) -> list[str]:
    """One process, tensor, pipeline, expert, both first ones: with the least ways above 1 that divide this model."""
    ways = next((d for d in (2, 3, 5, 7) if not arch.num_kv_heads % d), 1)
    stages = next((d for d in (2, 3, 5, 7) if not arch.num_layers % d), 1)
    sequence = "-sp" if arch.num_experts else ""
    wanted = ["dp", f"tp{ways}{sequence}", f"pp{stages}", f"tp{ways}{sequence}-pp{stages}"]
    wanted += ["ep2"] if arch.num_experts else []
    return [name for name in dict.fromkeys(wanted) if "tp1" not in name and "pp1" not in name and _ranks(arch, name)]


def _ranks(arch: ModelArch, name: str) -> int:
    """The fewest processes that a layout takes; 0 where this model cannot be cut so."""
    parallel, _ = parse_layout(name)
    worlds = range(parallel.model_ranks, MOST_RANKS + 1, parallel.model_ranks)
    return next((world for world in worlds if not problems(arch, parallel, world)), 0)


def _by_world(arch: ModelArch, names: Sequence[str]) -> dict[int, list[str]]:
    """Layouts by the processes that they take: starting processes is what costs."""
    worlds: dict[int, list[str]] = {}
    for name in names:
        ranks = _ranks(arch, name)
        if not ranks:
            parallel, _ = parse_layout(name)
            why = "; ".join(problems(arch, parallel, parallel.model_ranks))
            raise ConfigError(f"layout {name!r} does not fit {arch.architecture}: {why}")
        worlds.setdefault(ranks, []).append(name)
    return dict(sorted(worlds.items()))


def _at_world(world: int, args: tuple[object, ...]) -> list[LayoutFacts]:
    """`climb` in `world` processes; what all ranks found, one a layout."""
    from megafuse.testing.distributed import WorkerFailed, run_distributed

    try:
        ranks = run_distributed(climb, world, *args, timeout=3600.0)
    except WorkerFailed as error:
        raise IntegrityError(str(error).strip().splitlines()[-1]) from error
    except MegafuseError:
        raise
    except Exception as error:  # whatever megatron-core and torch raise for a damaged checkpoint, of one process
        raise IntegrityError(f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1]}") from error
    joined = []
    for parts in zip(*ranks, strict=True):
        logits = next((part.logits for part in parts if part.logits is not None), None)
        compared = sum(part.compared for part in parts)
        wrong = tuple(dict.fromkeys(name for part in parts for name in part.wrong))
        direct = tuple(dict.fromkeys(name for part in parts for name in part.direct))
        joined.append(LayoutFacts(parts[0].layout, compared, wrong, direct, logits))
    return joined


def _loaded(fact: LayoutFacts) -> Finding:
    for how, names in (("loaded by megatron-core", fact.wrong), ("loaded from the folder", fact.direct)):
        if names:
            detail = f"{len(names)} parameters {how} are not the folder's: {', '.join(names[:5])}"
            return Finding("load", fact.layout, False, detail)
    return Finding("load", fact.layout, True, f"{fact.compared} tensors of all ranks, by way of either folder")


def _resaved(saved: Path, ckpt: Path) -> str:
    """Raises IntegrityError where the weights saved from a layout are not those of the checkpoint."""
    shutil.copytree(ckpt / "hf", saved / "hf")
    found, wanted = weights_digest(saved), weights_digest(ckpt)
    shutil.rmtree(saved)
    if found != wanted:
        raise IntegrityError(f"weights sha256 {found} after saving, {wanted} before")
    return "the same weights"


def _computed(fact: LayoutFacts, tolerance: float) -> Finding:
    report = fact.logits
    if report is None:
        return Finding("logits", fact.layout, False, "no rank has logits")
    if not report.relative <= tolerance:  # also where it is not a number
        return Finding("logits", fact.layout, False, f"the folders {describe(report)}")
    detail = f"{report.tokens} tokens: {report.relative:.1e} of the largest apart, argmax agrees at {report.agree:.1%}"
    return Finding("logits", fact.layout, True, detail)
