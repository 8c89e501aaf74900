"""Counts, and times nothing: tokens that training computes over tokens that it needs, on real responses.

    python bench/prefix_tokens.py DATA_FOLDER [--tokenizer HF_FOLDER]

Writes bench/results/prefix_tokens.json, the table of docs/prefix_sharing.md, and docs/prefix_sharing.png. Needed are a
prompt once and each of its responses: P + sum R_i a group. Two stages: FusePO keeps the K best sources of a prompt, of
each its best and its worst response, a source being a family of models as the files name it; FuseSFT keeps the best K
models, one response each. Prompts that have K; batches of 128 of them in one random order. Counted are

    padded            every response with its own copy of the prompt, in batches of 8 padded to the longest of them
    packed, separate  the same copies, packed by the planner of training into rows of at most 8192 tokens
    prefix-shared     each prompt once, packed likewise

Rows are rounded up to 128 places, the tile of the attention kernel on a GPU.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.bench.lengths import ByteRule, PromptLengths, TokenizerRule, TokenRule, read_lengths, summary
from megafuse.bench.shapes import SHAPES
from megafuse.bench.synthetic import SyntheticGroups
from megafuse.data.records import Response
from megafuse.data.rows import RowPlanner, RowShape
from megafuse.observe.manifest import file_sha256, utc_now, versions, write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
OUT, PAGE, PICTURE = (
    ROOT / name for name in ("bench/results/prefix_tokens.json", "docs/prefix_sharing.md", "docs/prefix_sharing.png")
)
FILES = ("gsm8k_fusion", "math5_fusion", "crux_fusion", "alpacaeval_fusion", "arenabench_fusion", "zh_fusion")
SOURCES = (1, 2, 4, 8, 16)
WAYS = {"padded": "padded", "separate": "packed, separate", "shared": "prefix-shared"}
COLOURS = {"padded": "#D55E00", "separate": "#56B4E9", "shared": "#009E73"}  # Okabe and Ito: told apart by all eyes
# stage -> (responses of a source, kind of its groups, what counts as a source)
STAGES: dict[str, tuple[int, str, Callable[[Response], str]]] = {
    "FusePO": (2, "pair", lambda response: response.source),
    "FuseSFT": (1, "sft", lambda response: f"{response.source}/{response.model}"),
}
MICRO_BATCH, BATCH, ROW, TILE, MAX_LENGTH = 8, 128, 8192, 128, 2048
BEGIN, END = "<!-- table: made by bench/prefix_tokens.py -->", "<!-- end of table -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with scored answers (*.jsonl.gz)")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder; default: UTF-8 bytes / 4")
    args = parser.parse_args()
    rule: TokenRule = TokenizerRule(args.tokenizer) if args.tokenizer else ByteRule(4)
    files = {name: count_file(args.data / f"{name}.jsonl.gz", rule) for name in FILES}
    setup = {
        "micro_batch": MICRO_BATCH, "global_batch": BATCH, "row_tokens": ROW, "row_multiple": TILE,
        "max_length": MAX_LENGTH,
    }  # fmt: skip
    facts = {"created": utc_now(), "versions": versions(), "token_rule": rule.name, "setup": setup, "files": files}
    write_json_atomic(OUT, facts)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(facts)}{END}{after}", encoding="utf-8")
    draw(files)
    print(markdown(facts))
    return 0


def count_file(path: Path, rule: TokenRule) -> dict[str, Any]:
    """Every stage, and every number of sources that at least a tenth of the file's prompts have."""
    facts: dict[str, Any] = {"sha256": file_sha256(path)}
    for stage, (responses, kind, source_of) in STAGES.items():
        data = read_lengths(path, rule, responses=responses, max_length=MAX_LENGTH, source_of=source_of)
        counts = []
        for sources in SOURCES:
            prompts = [p for p in data.prompts if len(p.sources) >= sources]
            if len(prompts) >= len(data.prompts) / 10:
                counts.append({"sources": sources, **count(prompts, sources, kind)})
        facts[stage] = {**summary(data.prompts), "left_out": data.left_out, "counts": counts}
    return facts


def count(prompts: Sequence[PromptLengths], sources: int, kind: str) -> dict[str, Any]:
    """Tokens needed, and computed over needed, for all `prompts` with `sources` sources each."""
    groups = SyntheticGroups(prompts, sources, kind=kind, vocab_size=2, seed=0)
    order = np.random.default_rng(0).permutation(len(groups))
    needed = int(groups.group_lengths.sum())
    computed = {
        "padded": padded(groups, order),
        "separate": packed(groups, order, prefix_sharing=False),
        "shared": packed(groups, order, prefix_sharing=True),
    }
    over = {way: round(tokens / needed, 3) for way, tokens in computed.items()}
    return {"prompts": len(groups), "needed": needed, "computed": computed, "computed_over_needed": over}


def padded(groups: SyntheticGroups, order: np.ndarray) -> int:
    """Prompt + response copies, group after group, in micro-batches of 8, each padded to its longest."""
    flat, offsets = groups.response_lengths
    copies = [int(groups.prompt_lengths[g] + r) for g in order for r in flat[offsets[g] : offsets[g + 1]]]
    parts = [copies[i : i + MICRO_BATCH] for i in range(0, len(copies), MICRO_BATCH)]
    return sum(len(part) * max(part) for part in parts)


def packed(groups: SyntheticGroups, order: np.ndarray, *, prefix_sharing: bool) -> int:
    """Places of all rows that training would compute on one rank. A group above a row's budget gets a longer row."""
    data: Any = groups  # has what a planner asks a data set for
    planner = RowPlanner(
        data,
        SHAPES["llama-3.2-1b"],
        max_row_tokens=ROW,
        max_group_tokens=1 << 20,
        prefix_sharing=prefix_sharing,
        shape=RowShape(multiple=TILE),
    )
    return sum(planner.plan(order[i : i + BATCH]).computed_tokens for i in range(0, len(order), BATCH))


def markdown(facts: dict[str, Any]) -> str:
    """The table, and what it was made with."""
    lines = ["| stage | data | K | prompts | tokens needed | " + " | ".join(WAYS.values()) + " |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for stage in STAGES:
        for name, found in facts["files"].items():
            for c in found[stage]["counts"]:
                over = " | ".join(f"{c['computed_over_needed'][way]:.2f}" for way in WAYS)
                lines.append(f"| {stage} | {name} | {c['sources']} | {c['prompts']:,} | {c['needed']:,} | {over} |")
    used = ", ".join(f"{k} {facts['versions'][k]}" for k in ("megafuse", "numpy", "transformers"))
    note = f"Tokens: {facts['token_rule']}. Made on {facts['created'][:10]} with {used}."
    return "\n".join([*lines, "", note, ""])


def draw(files: dict[str, Any]) -> None:
    """One panel a stage and file: computed over needed by the number of sources."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(STAGES), len(files), figsize=(12, 4.6), sharey=True, constrained_layout=True)
    for row, stage in zip(panels, STAGES):
        row[0].set_ylabel(f"{stage}\ntokens computed / needed")
        for panel, (name, found) in zip(row, files.items()):
            counts = found[stage]["counts"]
            for i, (way, label) in enumerate(WAYS.items()):
                x = np.arange(len(counts)) + 0.28 * (i - 1)
                heights = [c["computed_over_needed"][way] for c in counts]
                panel.bar(
                    x, heights, 0.26, color=COLOURS[way], label=label, hatch=("//", "", "..")[i], edgecolor="white"
                )
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_xticks(range(len(counts)), [f"{c['sources']}" for c in counts])
            panel.set_xlabel("K")
            panel.set_title(name, fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
