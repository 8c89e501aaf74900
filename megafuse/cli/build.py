"""`megafuse build`: scored answers to a tokenised data set for FuseSFT or FusePO."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megafuse.config.build import BuildConfig
from megafuse.data.build import BuildResult, build
from megafuse.data.groups import CANDIDATES, CUT, TIED
from megafuse.data.store import read_manifest
from megafuse.data.tally import CATEGORIES, TIE_ADVICE
from megafuse.errors import DataError
from megafuse.observe.console import make_console

DESCRIPTION = "Split, select, pair, weigh and tokenise scored answers into a data set that training reads."
CONFIG = BuildConfig


def run(config: BuildConfig) -> int:
    """Build, and print what was kept and what was left out and why."""
    console = make_console()
    beside = read_manifest(config.beside) if config.beside is not None else None
    if config.beside is not None and beside is None:
        raise DataError(f"beside: {config.beside} holds no megafuse data set")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tokenising", total=None)
        result = build(config, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(_table(result))
    console.print(composition_table([m for m in (beside, result.manifest) if m is not None]))
    console.print(_drops(result.manifest))
    if result.manifest.get("weight_by_source"):
        console.print(_shares(result.manifest))
    for note in _notes(result.manifest):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    state = "written" if result.fresh else "already there, built from the same input and settings; nothing was done"
    console.print(f"{result.path}: {state}", soft_wrap=True)
    return 0


def _table(result: BuildResult) -> Table:
    manifest = result.manifest
    table = Table(title=f"{manifest['kind']} data set", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    for key in ("groups", "responses", "terms", "tokens", "tokens_unshared", "max_group_tokens", "max_sequence_tokens"):
        table.add_row(key, f"{manifest[key]:,}", style="bold")
    for key, value in manifest["counts"].items():
        table.add_row(key, f"{value:,}")
    return table


def composition_table(manifests: Sequence[Mapping[str, Any]]) -> Table:
    """The table of FuseChat-3.0's data section: a row a data set of origin, a column of kept prompts a data set."""
    table = Table(title="Composition")
    table.add_column("Dataset")
    table.add_column("Total Count", justify="right")
    for manifest in manifests:
        table.add_column(f"{_STAGES.get(manifest['kind'], manifest['kind'])} Count", justify="right")
    table.add_column("Category")
    kept = [{(r["domain"], r["dataset"]): r for r in m.get("composition", [])} for m in manifests]
    order = {domain: n for n, domain in enumerate(CATEGORIES)}
    keys = sorted({key for rows in kept for key in rows}, key=lambda key: (order.get(key[0], len(order)), key))
    totals = [0] * (1 + len(manifests))
    for key in keys:
        numbers = [max(rows[key]["prompts"] for rows in kept if key in rows)]
        numbers += [rows[key]["kept"] if key in rows else 0 for rows in kept]
        totals = [total + number for total, number in zip(totals, numbers)]
        table.add_row(key[1], *(f"{n:,}" for n in numbers), CATEGORIES.get(key[0], key[0]))
    table.add_row("Total", *(f"{n:,}" for n in totals), "All", style="bold")
    return table


_STAGES = {"sft": "SFT", "pair": "DPO", "rloo": "RLOO", "wrpo": "WRPO", "rank": "Eval"}


def _drops(manifest: Mapping[str, Any]) -> Table:
    """Why prompts of each data set of origin are not in this one, and responses and pairs of each source."""
    table = Table(title="Left out, and why")
    table.add_column("of")
    table.add_column("reason")
    table.add_column("number", justify="right")
    for row in manifest.get("composition", []):
        for reason, number in {**row["left_out"], **row["dropped"]}.items():
            table.add_row(f"{row['dataset']} ({row['domain']})", reason, f"{number:,}")
    for source, counts in manifest.get("counts_by_source", {}).items():
        for name, number in counts.items():
            if "dropped." in name:
                table.add_row(f"source {source}", name, f"{number:,}")
    return table


def _shares(manifest: Mapping[str, Any]) -> Table:
    """What selection does to the sources: their shares of the responses before and after, and of the weight."""
    table = Table(title="Shares of the sources")
    table.add_column("source")
    for column in ("to select from", "share", "kept", "share", "share of the weight"):
        table.add_column(column, justify="right")
    counts, weights = manifest["counts_by_source"], manifest["weight_by_source"]
    numbers = {s: (found.get(CANDIDATES, 0), found.get("responses_kept", 0)) for s, found in counts.items()}
    before, after = (max(1, sum(column)) for column in zip(*numbers.values()))
    for source, (given, kept) in numbers.items():
        share = f"{weights.get(source, 0.0) / sum(weights.values()):.1%}"
        table.add_row(source, f"{given:,}", f"{given / before:.1%}", f"{kept:,}", f"{kept / after:.1%}", share)
    return table


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    """What the numbers mean for the training: ties through the cut, terms that teach little."""
    counts, notes = manifest["counts"], []
    if CUT in counts:
        tied = counts.get(TIED, 0)
        notes.append(f"in {tied:,} of {counts[CUT]:,} prompts the k-th ties with one left out")
        if tied:
            notes.append(TIE_ADVICE)
    for source, found in manifest.get("counts_by_source", {}).items():
        if number := found.get("terms_kept.equal_rewards"):
            notes.append(
                f"source {source}: in {number:,} prompts all of its rewards are equal, which gives RLOO no advantage "
                f"but that of its KL term"
            )
    return notes
