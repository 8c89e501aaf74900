"""One self-contained HTML page about scored answers: inline SVG, no script, nothing fetched."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megafuse.data.pairs import TOP_K
from megafuse.data.report import ALPHAS, ReportData
from megafuse.data.tally import TIE_ADVICE

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}figure{margin:1rem 0}figcaption,.note{color:#555;font-size:.9em}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem;max-height:22rem;overflow:auto}summary{cursor:pointer}
"""


def page(data: ReportData, *, title: str, unit: str, manifests: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Args:
        data: the numbers.
        title: its heading.
        unit: of lengths: characters or tokens.
        manifests: of data sets built from these answers, for what they left out.
    """
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{data.prompts:,} prompts ({_shares(data.domains)}), {sum(map(len, data.rewards.values())):,} responses of "
        f"{len(data.rewards)} sources.</p>",
        "<h2>Sources</h2>", _sources(data, unit),
        _figure(lambda ax: _histograms(ax, data.rewards, data, "reward"), "Rewards of each source."),
        _figure(lambda ax: _histograms(ax, data.lengths, data, unit),
                f"Lengths of responses in {unit}; the longest 0.5% are in the last bin."),
        "<h2>Who wins</h2>", _win_matrix(data),
        "<h2>Which alpha mixes</h2>",
        _figure(lambda ax: _entropy(ax, data), f"Effective number of sources: exp of the entropy of Eq. 8's weights, "
                f"mean over {data.several:,} prompts with several sources. 1: the best has all the weight."),
        "<h2>What FuseSFT takes</h2>", _taken(data),
        "<h2>Pairs inside a source</h2>", _pairs(data, unit),
        "<h2>Left out</h2>", _drops(data, manifests),
        "<h2>Groups to read</h2>", *(_group(g) for g in data.groups),
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    line = "".join(f"<th>{_text(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{line}</tr>\n{body}</table>"


def _shares(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{_text(name)} {number:,}" for name, number in sorted(counts.items()))


def _figure(draw: Callable[[Any], None], caption: str) -> str:
    """An axes drawn by `draw`, as inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "megafuse", "svg.fonttype": "none"}):  # the same page from the same data
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{_text(caption)}</figcaption></figure>"


def _histograms(axes: Any, values: Mapping[str, Sequence[float]], data: ReportData, label: str) -> None:
    everything = np.concatenate([np.asarray(v, dtype=float) for v in values.values()]) if values else np.zeros(1)
    high = np.percentile(everything, 99.5) if label != "reward" else everything.max()
    bins = np.linspace(everything.min(), max(high, everything.min() + 1e-9), 41)
    for source in data.sources:
        clipped = np.clip(values[source], bins[0], bins[-1])
        share = np.full(len(clipped), 1 / len(clipped))
        axes.hist(clipped, bins=bins, histtype="step", weights=share, label=source.replace("$", r"\$"))
    axes.set_xlabel(label)
    axes.set_ylabel("share of its responses")
    if values:
        axes.legend(fontsize="small", ncols=2)


def _entropy(axes: Any, data: ReportData) -> None:
    axes.semilogx(ALPHAS, data.effective, marker="o", markersize=3)
    for alpha, name in ((1e-2, "FuseSFT"), (5e-3, "DPO"), (1e-3, "SimPO")):
        axes.axvline(alpha, color="0.7", linewidth=0.8)
        axes.annotate(name, (alpha, 1.0), fontsize="small", rotation=90, va="bottom", ha="right")
    axes.set_xlabel("alpha")
    axes.set_ylabel("effective sources")
    axes.set_ylim(0.9, max(1.1, float(data.effective.max(initial=1.0)) * 1.05))


def _sources(data: ReportData, unit: str) -> str:
    head = ["source", "responses", "reward mean", "reward sd", f"{unit} p50", f"{unit} p95", "best of a prompt",
            "correct", "cut off"]  # fmt: skip
    rows = []
    for source in data.sources:
        rewards, lengths, grades = data.rewards[source], data.lengths[source], data.correct[source]
        graded = grades["correct"] + grades["incorrect"]
        rows.append([
            source, f"{len(rewards):,}", f"{np.mean(rewards):.4g}", f"{np.std(rewards):.4g}",
            f"{np.percentile(lengths, 50):,.0f}", f"{np.percentile(lengths, 95):,.0f}",
            f"{data.best[source] / data.prompts:.1%}", f"{grades['correct'] / graded:.1%}" if graded else "-",
            f"{data.finish[source]['length'] / len(rewards):.1%}",
        ])  # fmt: skip
    return _table(head, rows)


def _win_matrix(data: ReportData) -> str:
    names = data.sources
    rates = {(a, b): data.win_rate(a, b) for a in names for b in names if a != b}
    rows = [[a, *("" if a == b or rates[a, b] is None else f"{rates[a, b]:.0%}" for b in names)] for a in names]
    note = "Row above column: share of the prompts both answered whose best response is better, a tie half."
    return _table(["", *names], rows) + f'<p class="note">{note}</p>'


def _taken(data: ReportData) -> str:
    answers = {source: len(data.rewards[source]) for source in data.sources}
    every, taken = sum(answers.values()), sum(data.taken.values())
    rows = [[s, f"{n / every:.1%}", f"{data.taken[s]:,}", f"{data.taken[s] / taken:.1%}"] for s, n in answers.items()]
    text = (
        f"<p>The {TOP_K} highest rewards of a prompt (<code>top_k_all</code>, of all answers here). In "
        f"{data.tied_at_k:,} of {data.prompts:,} prompts the last of them ties with one left out.</p>"
    )
    if data.tied_at_k:
        text += f'<p class="note">{_text(TIE_ADVICE)}</p>'
    return text + _table(["source", "share of the answers", "taken", "share of what is taken"], rows)


def _pairs(data: ReportData, unit: str) -> str:
    if not data.gaps:
        return f"<p>No pairs: {_shares(data.no_pair)}.</p>"
    untied = data.longer_chosen + data.longer_rejected
    bias = f"{data.longer_chosen / untied:.1%}" if untied else "-"
    inside = sum(0.01 <= g <= 0.1 for g in data.gaps)
    text = (
        f"<p>{len(data.gaps):,} pairs; {inside / len(data.gaps):.1%} have a gap from 0.01 to 0.1. The chosen response "
        f"is the longer one (in {unit}) in {bias} of those of unequal length: 50% is no length bias.</p>"
    )
    if data.no_pair:
        text += f"<p>Without a pair: {_shares(data.no_pair)}.</p>"

    def draw(axes: Any) -> None:
        axes.hist(data.gaps, bins=40, range=(0, max(data.gaps)))
        axes.set_xlabel("reward gap of a pair")
        axes.set_ylabel("pairs")

    return text + _figure(draw, "Best minus worst reward inside a source.")


def _drops(data: ReportData, manifests: Sequence[Mapping[str, Any]]) -> str:
    rows = [["these files", name, f"{n:,}"] for name, n in sorted(data.dropped.items())]
    for manifest in manifests:
        for row in manifest.get("composition", []):
            for reason, number in {**row["left_out"], **row["dropped"]}.items():
                rows.append([f"{manifest['kind']}: {row['dataset']} ({row['domain']})", reason, f"{number:,}"])
        for name, number in manifest.get("counts", {}).items():
            if name.startswith(("responses_dropped.", "terms_dropped.")):
                rows.append([f"{manifest['kind']}", name, f"{number:,}"])
    return _table(["of", "reason", "number"], rows) if rows else "<p>Nothing.</p>"


def _group(record: Any) -> str:
    prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in record.messages)
    parts = [
        f"<details><summary>{_text(record.prompt_id)} ({_text(record.domain)})</summary><pre>{_text(prompt)}</pre>"
    ]
    for response in sorted(record.responses, key=lambda r: -(r.reward or 0.0)):
        grade = {True: ", correct", False: ", incorrect", None: ""}[response.correct]
        parts.append(
            f"<p><b>{_text(response.source)}</b> {response.reward:.5g}{grade}</p><pre>{_text(response.text)}</pre>"
        )
    return "".join(parts) + "</details>"
