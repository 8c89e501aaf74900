"""`megafuse data check`: what input files hold, and which of their lines are wrong."""

from pathlib import Path
from typing import Literal

import tyro
from pydantic import Field
from rich.table import Table

from megafuse.config.base import Config
from megafuse.data.check import PERCENTILES, DataReport, check, percentiles
from megafuse.data.pairs import TOP_K
from megafuse.data.tokenise import token_counter
from megafuse.observe.console import make_console

DESCRIPTION = "Check input files line by line and show what they hold. Exit status: 2 with bad records or none, else 0."
_GAPS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)


class DataCheckConfig(Config):
    """Which files, and what their records must have."""

    files: tyro.conf.Positional[tuple[Path, ...]] = Field(min_length=1)
    """.jsonl files, or gzips of them."""
    form: Literal["scored", "responses", "prompts"] = "scored"
    """responses: rewards are not needed yet. prompts: nor are responses."""
    reward_field: str = Field("reward", min_length=1)
    """Key of a response that holds its reward."""
    on_bad_response: Literal["refuse", "drop"] = "refuse"
    """drop: count responses without text or without a finite reward, as `megafuse build` would, and accept them."""
    tokenizer: Path | None = None
    """Hugging Face folder: show lengths in its tokens too."""


CONFIG = DataCheckConfig


def run(config: DataCheckConfig) -> int:
    """Print the statistics, then the first errors as `file:line:col: reason` and their number."""
    console = make_console()
    report = check(
        config.files,
        form=config.form,
        reward_field=config.reward_field,
        drop_bad_responses=config.on_bad_response == "drop",
        lengths=token_counter(config.tokenizer) if config.tokenizer is not None else None,
    )
    console.print(_overview(report))
    if report.sources:
        console.print(_sources(report))
    if report.gaps:
        console.print(_pairs(report))
    if report.tied_at_k:
        ties = (
            f"in {report.tied_at_k:,} of {report.prompts:,} prompts the {TOP_K}th highest reward ties with one left out"
        )
        console.print(f"{ties}: `megafuse data report` shows what it does to the sources", soft_wrap=True)
    for error in report.errors:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    if report.fatal:
        console.print(report.fatal, style="red", markup=False, highlight=False, soft_wrap=True)
    else:  # the sum of what could not all be read would be a wrong one
        more = report.error_count - len(report.errors)
        summary = f"{report.error_count} bad record(s){f', {more} of them not shown' if more else ''}"
        if not report.prompts and not report.error_count:
            summary = f"no records in {', '.join(map(str, config.files))}"
        elif report.nothing_left:
            summary += f"; no good {'response' if report.prompts else 'record'} is left"
        console.print(summary, style="green" if report.ok else "red", markup=False, soft_wrap=True)
    return 0 if report.ok else 2


def _overview(report: DataReport) -> Table:
    table = Table(title="Input", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = {"prompts": report.prompts, "responses": report.responses, "graded responses": report.graded}
    rows |= {f"prompts of domain {name}": number for name, number in sorted(report.domains.items())}
    rows |= {f"responses dropped: {name}": number for name, number in sorted(report.dropped.items())}
    for name, number in rows.items():
        table.add_row(name, f"{number:,}")
    names = "/".join({0: "min", 100: "max"}.get(p, f"p{p}") for p in PERCENTILES)
    for unit, values in (("characters", report.prompt_chars), ("tokens", report.prompt_tokens)):
        if values:
            table.add_row(f"prompt {unit} {names}", _spread(values))
    return table


def _sources(report: DataReport) -> Table:
    table = Table(title="Sources")
    table.add_column("source")
    tokens = bool(report.prompt_tokens)
    units = ("characters", "tokens") if tokens else ("characters",)
    for column in ("responses", "reward mean", "reward min", "reward max", *(f"{u} min/p50/p95/max" for u in units)):
        table.add_column(column, justify="right")
    for name, stats in sorted(report.sources.items()):
        rewards = stats.rewards
        mean = sum(r / len(rewards) for r in rewards)  # divided first: a sum of large rewards may overflow
        shown = [f"{mean:.4g}", f"{min(rewards):.4g}", f"{max(rewards):.4g}"] if rewards else ["-"] * 3
        lengths = [_spread(stats.chars), _spread(stats.tokens)] if tokens else [_spread(stats.chars)]
        table.add_row(name, f"{stats.responses:,}", *shown, *lengths)
    return table


def _pairs(report: DataReport) -> Table:
    table = Table(title=f"Best/worst pairs inside a source ({report.tie_rate:.1%} ties)")
    table.add_column("reward gap at least", justify="right")
    table.add_column("pairs", justify="right")
    for bound in _GAPS:
        table.add_row(f"{bound:g}", f"{sum(gap >= bound for gap in report.gaps):,}")
    for reason, number in sorted(report.no_pair.items()):
        table.add_row(f"none: {reason}", f"{number:,}", style="dim")
    return table


def _spread(values: list[int]) -> str:
    return "/".join(f"{value:,.0f}" for value in percentiles(values))
