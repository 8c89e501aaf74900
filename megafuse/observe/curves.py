"""RUN/curves.png: how a run, or a chain of stages, went."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megafuse.errors import ConfigError
from megafuse.observe.manifest import atomic_file
from megafuse.observe.metrics import number, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# name, title, line colour (Okabe and Ito: told apart with any colour vision)
_PANELS = (
    ("loss", "loss", "#0072B2"),
    ("margin", "margin", "#009E73"),
    ("accuracy", "preference accuracy", "#D55E00"),
    ("grad_norm", "gradient norm", "#CC79A7"),
    ("lr", "learning rate", "#56B4E9"),
    ("tokens_per_second", "tokens per second", "#E69F00"),
)
_GREY = "#666666"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


def plot_run(run_dirs: Sequence[tuple[str, str | Path]], out: str | Path, title: str) -> None:
    """Draw loss, margin, accuracy, gradient norm, learning rate and tokens/s over steps, the stages side by side.

    A noisy curve is drawn faint with its exponential mean on top. Steps whose loss or gradient norm was not finite are
    marked in red. What no stage reports gets no panel; what one stage lacks (FuseSFT has no margin) says so.

    Arguments:
        run_dirs: (label, run folder or metrics.jsonl) of each stage, in order.
        out: the PNG, written whole or not at all.
        title: one line on top.
    Raises:
        ConfigError: no run is given.
        IntegrityError: a run has no metrics.jsonl, or it is damaged or without a step.
    """
    if not run_dirs:
        raise ConfigError("no run to draw: give at least one (label, run folder)")
    figure = run_figure([(label, read_metrics(path)) for label, path in run_dirs], title)
    with atomic_file(out) as file:
        figure.savefig(file, format="png")


def run_figure(stages: Sequence[tuple[str, Sequence[dict[str, Any]]]], title: str) -> "Figure":
    """The figure of `plot_run` from the records of each stage: (label, records of `read_metrics`)."""
    # Imported here, and without pyplot: plotting is the only use, and pyplot keeps state that outlives the call.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [p for p in _PANELS if any(number(r, p[0]) is not None for _, records in stages for r in records)]
    rows, columns = (math.ceil(len(panels) / 2), 2) if len(panels) > 1 else (1, 1)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.4, 6.0 * len(stages)), 0.9 + 2.1 * rows), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=12, fontweight="bold")
        blocks = figure.subfigures(1, len(stages), squeeze=False, wspace=0.03)
        for block, (label, records) in zip(blocks[0], stages):
            _draw_stage(block, label, records, panels, (rows, columns))
        figure.draw_without_rendering()  # lays out while the style holds
    return figure


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential mean with weight 2/(span+1) for the newest value, corrected for its start. NaN is passed over.

    values: [n] float64. Returns [n] float64: sum_j (1-a)^(i-j) v_j / sum_j (1-a)^(i-j) over the finite v_j, j <= i.
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    means = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        total, weight = total * keep, weight * keep
        if np.isfinite(value):
            total, weight = total + value, weight + 1
        if weight:
            means[i] = total / weight
    return means


def _draw_stage(
    block: "SubFigure",
    label: str,
    records: Sequence[dict[str, Any]],
    panels: Sequence[tuple[str, str, str]],
    grid: tuple[int, int],
) -> None:
    """One stage: its panels in a grid of `grid` = (rows, columns)."""
    broken = [r["step"] for r in records if {"loss", "grad_norm"} & set(r.get("nonfinite", ()))]
    facts = f"{records[-1]['step']:,} steps" if records else "no steps yet"
    if broken:
        facts += f", {len(broken)} not finite (red)"
    block.suptitle(f"{label}   {facts}", fontsize=10, color=_GREY)
    steps = np.array([record["step"] for record in records], dtype=np.int64)
    axes = block.subplots(*grid, squeeze=False, sharex=True).ravel()
    for axis, panel in zip(axes, panels):
        values = np.array([number(record, panel[0]) for record in records], dtype=np.float64)  # None becomes NaN
        _draw_panel(axis, steps, values, panel, broken)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis in axes[max(0, len(panels) - grid[1]) : len(panels)]:
        axis.set_xlabel("step", color=_GREY)
        axis.tick_params(labelbottom=True)


def _draw_panel(
    axis: "Axes", steps: np.ndarray, values: np.ndarray, panel: tuple[str, str, str], broken: Sequence[int]
) -> None:
    """One curve. steps [n] int64, values [n] float64 with NaN for none."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    name, title, colour = panel
    axis.set_title(title)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    reported = int(np.isfinite(values).sum())
    if not reported:
        axis.text(0.5, 0.5, "not reported", transform=axis.transAxes, ha="center", va="center", color="#aaaaaa")
        axis.set_yticks([])
        axis.grid(False)
        axis.spines[:].set_color("#e6e6e6")
        return
    exact = reported < 30 or name == "lr"  # nothing to smooth
    marker = "o" if reported < 15 else ""
    axis.plot(steps, values, color=colour, lw=1.5 if exact else 0.8, alpha=1 if exact else 0.3, marker=marker, ms=3)
    if not exact:
        axis.plot(steps, smooth(values, span=max(10, len(steps) / 25)), color=colour, lw=1.7)
    for step in broken:
        axis.axvline(step, color="#d62728", lw=0.8, alpha=0.7)
    if name in ("accuracy", "margin"):  # a coin's accuracy, and its margin
        axis.axhline(0.5 if name == "accuracy" else 0, color="#999999", lw=0.8, ls=(0, (4, 3)))
    if name == "accuracy":
        axis.set_ylim(0, 1.02)
    elif name in ("lr", "tokens_per_second"):
        axis.set_ylim(0, 1.1 * np.nanmax(values) or None)
        axis.yaxis.set_major_formatter(EngFormatter(sep="") if name != "lr" else FuncFormatter(lambda v, _: f"{v:g}"))
