"""The table at the end of the quick start: what each stage did to the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table


@dataclass(frozen=True)
class StageRow:
    """One line of the table: the model before training, or after a stage. What is None shows as `-`."""

    stage: str
    """E.g. `before`, `after FuseSFT`, `after FusePO`."""
    intra: float | None = None
    """Intra-rank accuracy, 0 to 1."""
    cross: float | None = None
    """Cross-rank accuracy, 0 to 1."""
    per_source: Mapping[str, float | None] = field(default_factory=dict)
    """Intra-rank accuracy of each source, 0 to 1."""
    best_logp: float | None = None
    """Mean log-prob per token of the highest-reward responses, nats."""
    worst_logp: float | None = None
    """The same of the lowest-reward responses."""
    tokens_per_second: float | None = None
    """Throughput of the stage's training."""


def stage_table(rows: Sequence[StageRow], title: str = "Rank accuracy by stage") -> tuple[Table, str]:
    """(table for a terminal, the same as Markdown with a line a stage).

    Accuracies are in percent; from the second stage on with their change.

    Changes are against the first row, in percentage points and nats, so that a reader sees what training did at once.
    A source that only some rows have gets a column all the same; a column that no row fills is left out.
    """
    sources = sorted({name for row in rows for name in row.per_source})
    columns: list[tuple[str, Callable[[StageRow], float | None], Callable[[float, float | None], str]]] = [
        ("intra %", lambda row: row.intra, _percent),
        ("cross %", lambda row: row.cross, _percent),
        *((f"{name} %", _source(name), _percent) for name in sources),
        ("best logp", lambda row: row.best_logp, _nats),
        ("worst logp", lambda row: row.worst_logp, _nats),
        ("tokens/s", lambda row: row.tokens_per_second, lambda value, first: f"{value:,.0f}"),
    ]
    header = ["stage"]
    body = [[row.stage] for row in rows]
    for name, get, text in columns:
        values = [get(row) for row in rows]
        if all(value is None for value in values):
            continue
        header.append(name)
        for i, (line, value) in enumerate(zip(body, values)):
            line.append("-" if value is None else text(value, values[0] if i else None))
    # stages side by side: a terminal is narrow, and there are more numbers than stages
    table = Table(header[0], title=title)
    for line in body:
        table.add_column(line[0], justify="right")
    for name, *cells in list(zip(header, *body))[1:]:
        table.add_row(name, *cells)
    return table, _markdown(header, body)


def _source(name: str) -> Callable[[StageRow], float | None]:
    return lambda row: row.per_source.get(name)


def _percent(value: float, first: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if first is None else f" ({100 * (value - first):+.1f})")


def _nats(value: float, first: float | None) -> str:
    return f"{value:.4f}" + ("" if first is None else f" ({value - first:+.4f})")


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right; `|` in a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, *body)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:])) + "\n"
