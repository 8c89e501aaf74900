"""`megafuse score`: responses to scored responses."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megafuse.config.score import ScoreConfig
from megafuse.observe.console import make_console
from megafuse.rewards.score import score

DESCRIPTION = "Verify and score every response; started again after a kill, it goes on where it stopped."
CONFIG = ScoreConfig


def run(config: ScoreConfig) -> int:
    """Score, and print verdicts and what got no reward."""
    console = make_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("scoring chunks", total=None)
        result = score(config, lambda done, total: bar.update(task, completed=done, total=total))
    table = Table(title="Scores", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, number in result.counts.items():
        table.add_row(name, f"{number:,}")
    console.print(table)
    for path in result.damaged:
        console.print(f"[yellow]warning:[/yellow] a damaged chunk was set aside and made again: {path}", soft_wrap=True)
    state = f"{result.made} chunk(s) scored; " + ("written" if result.complete else "other jobs are not done yet")
    console.print(f"{config.output}: {state}", soft_wrap=True)
    return 0
