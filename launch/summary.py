"""The table of a sweep: a line a point, in Markdown, CSV, JSON and on the terminal."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megafuse.launch.sweep import Point, last_start, queued
from megafuse.observe.manifest import atomic_file, write_json_atomic
from megafuse.observe.metrics import METRICS_FILE, number, read_metrics

LAST_STEPS = 10
"""Steps at the end of a run that loss and margin are averaged over: one batch alone says little."""


@dataclass(frozen=True)
class Row:
    """What a point has come to. None: not there, or not there yet."""

    point: str
    settings: dict[str, Any]
    status: str
    """done, or how far it is, or why it stopped."""
    steps: int = 0
    loss: float | None = None
    """Mean of the last LAST_STEPS steps."""
    margin: float | None = None
    """Mean of the last LAST_STEPS steps; preference losses have one."""
    intra: float | None = None
    """Intra-rank accuracy on the held-out prompts, 0 to 1."""
    cross: float | None = None
    """Cross-rank accuracy, 0 to 1."""
    tokens_per_second: float | None = None
    """Median over the steps after the first."""


def row_of(point: Point) -> Row:
    """Read a point's folder."""
    train = _train_folder(point.folder)
    records = read_metrics(train) if (train / METRICS_FILE).is_file() else []
    accuracy = _json(point.folder / "eval" / "accuracy.json")
    tail = records[-LAST_STEPS:]
    return Row(
        point.name,
        point.settings,
        _status(point, train),
        steps=int(records[-1]["step"]) if records else 0,
        loss=_mean([number(record, "loss") for record in tail]),
        margin=_mean([number(record, "margin") for record in tail]),
        intra=accuracy.get("intra"),
        cross=accuracy.get("cross", {}).get("accuracy"),
        tokens_per_second=_median([number(record, "tokens_per_second") for record in records[1:] or records]),
    )


def write_summary(folder: Path, rows: Sequence[Row]) -> Table:
    """Write summary.md, summary.csv and summary.json into the sweep's folder; returns the table for a terminal."""
    header, body = ["point", *_COLUMNS, "status"], [_cells(row) for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * len(_COLUMNS) + "---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in body]
    note = f"Loss and margin: mean of the last {LAST_STEPS} steps. Accuracies in percent, on held-out prompts."
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    axes = sorted({axis for row in rows for axis in row.settings})
    names = ["point", *axes, "steps", "loss", "margin", "intra", "cross", "tokens_per_second", "status"]
    writer.writerow(names)
    for row in rows:
        plain = {**{axis: _text(value) for axis, value in row.settings.items()}, **asdict(row)}
        writer.writerow([plain.get(name) for name in names])
    for name, content in (("summary.md", "\n".join([*lines, "", note]) + "\n"), ("summary.csv", text.getvalue())):
        with atomic_file(folder / name) as file:
            file.write(content.encode())
    write_json_atomic(folder / "summary.json", [asdict(row) for row in rows])
    table = Table(title=str(folder), caption=note)
    for name in header:
        table.add_column(name, justify="right" if name in _COLUMNS else "left", no_wrap=name == "point")
    for cells in body:
        table.add_row(*cells)
    return table


_COLUMNS = ("steps", "loss", "margin", "intra %", "cross %", "tokens/s")


def _cells(row: Row) -> list[str]:
    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(scale * value, form)

    return [
        row.point, str(row.steps), shown(row.loss, ".4f"), shown(row.margin, ".4f"), shown(row.intra, ".1f", 100),
        shown(row.cross, ".1f", 100), shown(row.tokens_per_second, ",.0f"), row.status,
    ]  # fmt: skip


def _status(point: Point, train: Path) -> str:
    if point.done:
        return "done"
    started = last_start(point.folder)
    if not started:
        return "not begun"
    outcome, heart = _json(train / "outcome.json"), _json(train / "heartbeat.json")
    step = f"step {heart['step']} of {heart['total']}" if "total" in heart else "before training"
    if state := queued(started.get("job", "")):
        return f"{state.lower()}, {step}"
    why = f": {outcome['reason']} (exit code {outcome['code']})" if outcome else ""
    if started["state"].startswith("SUBMITTED"):
        return f"ended, {step}{why}"
    return f"{started['state'].lower()}, {step}{why}"


def _train_folder(run: Path) -> Path:
    """RUN/train; of a recipe with several stages the last one's."""
    stages = [run / "train", *sorted(run.glob("*/train"), key=lambda path: path.stat().st_mtime, reverse=True)]
    return next((path for path in stages if path.is_dir()), stages[0])


def _json(path: Path) -> dict[str, Any]:
    """A file that is being written by others, or is not there, is an empty one."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _text(value: Any) -> str:
    return "+".join(value) or "all" if isinstance(value, list | tuple) else str(value)
