"""How much the quick start trains on: one step is measured on this machine, and the prompts follow from the time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megafuse.doctor.hardware import memory_bytes, usable_cores
from megafuse.observe.manifest import read_json, write_json_atomic

# Tokens a pass, where the time allows: more of them would not show more. Prompts above that are left out, and said so.
BUDGET = {"sft": 14_000, "pair": 36_000, "rank": 30_000}
# What each token of a data set costs, in tokens of a training step: forward and backward are 3, forward alone is 1.
PASSES = {"sft": 1.0, "pair": 1.0 + 1 / 3, "rank": 1.0}  # pair: the reference pass too; rank: three evaluations
LAUNCHES = 8  # after the measurement: train twice, eval three times, reference, export, and the builds together
MARGIN = 0.85  # of the time is planned: steps differ in length, and other programs run
TWO_PROCESSES = 8 * 2**30  # bytes: two processes take 6.6 GiB together, one 4.3
LEAST = 0.05  # of the budget: below, there is nothing to see


@dataclass(frozen=True)
class Speed:
    """What a FusePO step of the target costs here. Tokens are those of prompts, once, and responses."""

    prompts: int
    step_seconds: float
    tokens_per_second: float
    start_seconds: float  # of a command, before its first step
    precision: str


@dataclass(frozen=True)
class Plan:
    """The share of BUDGET that is taken, prompts by kind of data set, and the minutes that the rest will take."""

    factor: float
    prompts: dict[str, int]
    minutes: float


def read_speed(report: Mapping[str, Any], command_seconds: float) -> Speed:
    """The speed in a report of `megafuse bench` whose command took `command_seconds`, with equal steps of warm-up."""
    result = report["results"][0]
    steps = report["config"]["steps"] + report["config"]["warmup"]
    return Speed(
        prompts=result["prompts"],
        step_seconds=result["step_seconds"],
        tokens_per_second=result["tokens_per_second"],
        start_seconds=max(0.0, command_seconds - steps * result["step_seconds"]),
        precision=report["config"]["model"]["precision"],
    )


def pass_seconds(tokens: Mapping[str, float], speed: Speed) -> float:
    """Seconds of every pass over data sets of so many `tokens`, without the starts of the commands."""
    return sum(PASSES[kind] * tokens[kind] for kind in BUDGET) / speed.tokens_per_second


def plan(sizes: Mapping[str, Mapping[str, int]], speed: Speed, seconds_left: float) -> Plan:
    """What of data sets of `sizes` ({kind: {groups, tokens}}) fits `seconds_left`, at most BUDGET."""
    whole = {kind: float(min(BUDGET[kind], sizes[kind]["tokens"])) for kind in BUDGET}
    factor = (MARGIN * seconds_left - LAUNCHES * speed.start_seconds) / max(pass_seconds(whole, speed), 1e-9)
    return scaled(sizes, speed, min(1.0, max(LEAST, factor)), whole)


def scaled(
    sizes: Mapping[str, Mapping[str, int]], speed: Speed, factor: float, of: Mapping[str, float] = BUDGET
) -> Plan:
    """`factor` of so many tokens, whatever the time."""
    tokens = {kind: min(factor * of[kind], sizes[kind]["tokens"]) for kind in BUDGET}
    prompts = {
        kind: max(1, int(sizes[kind]["groups"] * tokens[kind] / max(1, sizes[kind]["tokens"]))) for kind in BUDGET
    }
    return Plan(factor, prompts, (LAUNCHES * speed.start_seconds + pass_seconds(tokens, speed)) / 60)


def save(path: Path, speed: Speed, chosen: Plan, origin: Mapping[str, Any]) -> None:
    """Keep both, and the `origin` of the data that they are for, for a second start of the same run."""
    write_json_atomic(path, {"speed": asdict(speed), "plan": asdict(chosen), "origin": dict(origin)})


def saved(path: Path) -> tuple[Speed, Plan] | None:
    """What `save` has kept."""
    if not path.is_file():
        return None
    found = read_json(path)
    return Speed(**found["speed"]), Plan(**found["plan"])


def processes_here() -> int:
    """Data-parallel processes for this machine: two where there are two cores and memory for both, else one."""
    return 2 if usable_cores() >= 2 and memory_bytes() >= TWO_PROCESSES else 1
