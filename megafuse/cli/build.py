"""`megafuse build`: scored answers to a tokenised data set for FuseSFT or FusePO."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megafuse.config.build import BuildConfig
from megafuse.data.build import BuildResult, build

DESCRIPTION = "Split, select, pair, weigh and tokenise scored answers into a data set that training reads."
CONFIG = BuildConfig


def run(config: BuildConfig) -> int:
    """Build, and print what was kept and what was left out and why."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tokenising", total=None)
        result = build(config, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(_table(result))
    for warning in result.manifest.get("warnings", []):
        console.print(f"[yellow]warning:[/yellow] {warning}")
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
