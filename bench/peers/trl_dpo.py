"""TRL's DPOTrainer on the very prompts, pairs, tokens and model shape that `megafuse bench --loss dpo` measures.

    python bench/peers/trl_dpo.py --data scored.jsonl.gz [--model llama-3.2-1b] [--sources 4] [--out trl.json]

At its best setting: bfloat16 weights and Adam moments (half of what megafuse keeps), fused AdamW, its fused LM head,
sdpa, no checkpointing, reference log-probs given, the pairs of a step sorted by length so that little is padding.
PAIRS_PER_FORWARD are what to try, one after the other: one that raises, for want of memory perhaps, is `failed`, and
the next begins. OUT is written after each, `complete` at the end.

Before anything is timed, TRL and megafuse compute the loss of the first step on the same random weights and tokens
(megafuse from the Hugging Face folder, in prefix-shared rows). Where loss and mean log-probs of the chosen and the
rejected responses do not agree within BOUND, `agree` is false. Exit status: 1 if so, or if anything raised; 2: no such
device, or no TRL.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megafuse.bench.measure import Stepper
from megafuse.bench.run import draw_batch, free_memory, read_data
from megafuse.bench.shapes import resolve_shape
from megafuse.bench.synthetic import SyntheticGroups
from megafuse.checkpoint.state import load_model
from megafuse.config.bench import BenchConfig
from megafuse.config.loss import LossConfig
from megafuse.config.train import OptimConfig
from megafuse.data.rows import RowPlanner, row_shape
from megafuse.errors import reason
from megafuse.losses.registry import make_loss
from megafuse.model.arch import ModelArch
from megafuse.model.build import DTYPES, build_model, choose_backend
from megafuse.observe.manifest import utc_now, versions, write_json_atomic
from megafuse.parallel.topology import layout, process_groups
from megafuse.training.optim import wrap_for_training

BETA = 0.1  # so large that the loss of a model that knows nothing is not ln 2, whatever is computed
# Of the loss, and relative of the mean log-probs. fp32: sums in other orders. bf16: the roundings of the layers, whose
# noise in the log-probs of a pair reaches the loss of a random model of Llama 3.2 1B's width and 16 layers with a
# standard deviation of 1.2e-3 to 1.7e-3 in the mean (`tiny` on a CPU: 2.4e-5 at most); means of log-probs lose it.
# Twice the beta in one of both moves that model's loss by some 0.4: 0.02 sqrt(2048) a logit, 131 tokens a response.
BOUND = {"fp32": {"loss": 1e-5, "logps": 1e-5}, "bf16": {"loss": 2e-2, "logps": 5e-4}}


def main() -> int:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench/peers/trl_dpo.py measures a CUDA device, and there is none here (--device cpu)", file=sys.stderr)
        return 2
    try:
        import trl
    except ImportError as error:
        print(f"{error}: install trl to compare with it", file=sys.stderr)
        return 2
    config = bench_config(args)
    arch = resolve_shape(config.model.path)
    if arch.architecture != "LlamaForCausalLM":
        print(f"--model {args.model} is a {arch.architecture}: only Llama's shapes are written here", file=sys.stderr)
        return 2
    batch = draw_batch(config, read_data(config))
    groups = SyntheticGroups(batch.prompts, args.sources, kind="pair", vocab_size=arch.vocab_size, seed=config.seed)
    pairs = pairs_of(groups)
    if wrong := [each for each in args.pairs_per_forward if len(pairs) % each]:
        print(f"--pairs-per-forward {wrong[0]} does not divide {len(pairs)} pairs", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "created": utc_now(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {**versions(), "trl": trl.__version__, "cuda": torch.version.cuda},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "data": batch.facts,
        "complete": False,
        "first_step": None,
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        measure(report, config, arch, groups, pairs, Path(folder), args)
    print(json.dumps({k: v for k, v in report.items() if k != "data"}, indent=1))
    failed = [found for found in report["results"] if "failed" in found]
    return 1 if failed or not report["first_step"]["agree"] else 0


def measure(
    report: dict[str, Any],
    config: BenchConfig,
    arch: ModelArch,
    groups: SyntheticGroups,
    pairs: list[dict[str, Any]],
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Compare the first step, then take the times of every number of pairs a forward, into `report`."""
    write(report, args)
    write_model(arch, folder / "hf", args)
    ours: dict[str, float] | None = None
    try:
        ours = our_first_step(config, arch, groups, folder / "hf")
    except Exception as error:
        traceback.print_exc()
        report["first_step"] = {"failed": f"megafuse: {reason(error)}", "agree": False}
    for each in args.pairs_per_forward:
        free_memory()
        found: dict[str, Any] = {"pairs_per_forward": each}
        try:
            trainer, clock = make_trainer(folder, pairs, args, each)
            if ours is not None and report["first_step"] is None:
                report["first_step"] = compare(ours, their_first_step(trainer, len(pairs) // each), args.precision)
                write(report, args)
            found |= timed(trainer, clock, groups, pairs, args, each)
        except Exception as error:
            traceback.print_exc()
            found["failed"] = reason(error)
        trainer = clock = None  # what it holds would be missing to the next
        report["results"].append(found)
        write(report, args)
    report["first_step"] = report["first_step"] or {"failed": "TRL: see results", "agree": False}
    report["complete"] = True
    write(report, args)


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(args.out, report)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a named shape of a Llama")
    parser.add_argument(
        "--data", type=Path, required=True, help="what `megafuse bench` takes: scored answers, data set"
    )
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--pairs-per-forward", type=int, nargs="+", default=[16], help="each divides prompts x sources")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=list(BOUND), default="bf16")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def bench_config(args: argparse.Namespace) -> BenchConfig:
    """The measurement of `megafuse bench` that this one stands beside."""
    return BenchConfig.model_validate(
        {
            "model": {"path": args.model, "precision": args.precision},
            "data": {"path": args.data},
            "loss": "dpo",
            "sources": (args.sources,),
            "global_batch_size": args.prompts,
            "prefix_sharing": "shared",
        }
    )


def pairs_of(groups: SyntheticGroups) -> list[dict[str, Any]]:
    """Every pair as TRL's collator takes it, shortest first; the reference knows nothing, as in `megafuse bench`."""
    rows = []
    for i in range(len(groups)):
        group = groups[i]
        for best, worst in group.members.tolist():
            chosen, rejected = (group.responses[j].tolist() for j in (best, worst))
            logps = [-math.log(groups.vocab_size) * len(ids) for ids in (chosen, rejected)]
            ids = {"prompt_ids": group.prompt.tolist(), "chosen_ids": chosen, "rejected_ids": rejected}
            rows.append({**ids, "ref_chosen_logps": logps[0], "ref_rejected_logps": logps[1]})
    return sorted(rows, key=lambda r: len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])))


def write_model(arch: ModelArch, folder: Path, args: argparse.Namespace) -> None:
    """A random model of this shape as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        tie_word_embeddings=arch.tie_word_embeddings,
        initializer_range=0.02,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(shape)
    model.to(DTYPES[args.precision]).save_pretrained(folder)


def our_first_step(config: BenchConfig, arch: ModelArch, groups: SyntheticGroups, folder: Path) -> dict[str, float]:
    """Loss and mean log-probs of megafuse's first step on the weights in `folder`, as `megafuse bench` makes it."""
    backend = choose_backend(
        config.model,
        config.parallel,
        head_dim=arch.head_dim,
        prefix_sharing=True,
        overlap=config.overlap,
        distributed_optimizer=config.distributed_optimizer,
    )
    loss = make_loss(LossConfig.model_validate({"name": "dpo", "beta": BETA}))
    optim = OptimConfig(lr=1e-9, schedule="constant", warmup_ratio=0.0, distributed=config.distributed_optimizer)
    data: Any = groups  # has what a planner asks a GroupDataset for
    with process_groups(), layout(config.parallel, seed=config.seed) as topology:
        model = build_model(arch, config.parallel, topology, backend, recompute=config.model.recompute)
        load_model(model, topology, folder)
        engine = wrap_for_training(model, optim, backend.policy, total_steps=1_000_000)
        planner = RowPlanner(
            data,
            arch,
            max_row_tokens=config.data.max_row_tokens,
            max_group_tokens=config.group_limit,
            prefix_sharing=True,
            shape=row_shape(config.parallel, topology.dp_size, backend),
        )
        _, result = Stepper(engine, topology, loss, groups, planner, True).step()
    found = {"loss": result.loss, **{k: result.metrics[f"{k}_logps"] for k in ("chosen", "rejected")}}
    return found


def make_trainer(folder: Path, pairs: list[dict[str, Any]], args: argparse.Namespace, each: int) -> tuple[Any, Any]:
    """(trainer of as many steps as asked for, its clock)."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        """Token ids and reference log-probs are in the data already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    class Clock(TrainerCallback):
        """The times at which steps end, and the first begins, on a device that is idle then."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not self.marks:
                self.on_step_end()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    cuda, total, clock = args.device == "cuda", args.warmup + args.steps, Clock()
    dtype = DTYPES[args.precision]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, attn_implementation=args.attention)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}  # never used: the data has token ids
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>"
    )
    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=each,
        gradient_accumulation_steps=len(pairs) // each,
        max_steps=total,
        bf16=args.precision == "bf16",
        beta=BETA,
        learning_rate=1e-9,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=True,
        max_length=None,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        use_cpu=not cuda,
        disable_tqdm=True,
    )
    data = Dataset.from_list(pairs * total)
    return Given(model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[clock]), clock


def their_first_step(trainer: Any, batches: int) -> dict[str, float]:
    """Loss and mean log-probs of TRL's first step, from the batches that it will train on; nothing is updated."""
    losses = []
    trainer.model.train()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for _, inputs in zip(range(batches), trainer.get_train_dataloader()):
            losses.append(float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))))
    seen = trainer._metrics["train"]
    found = {key: statistics.mean(seen[f"logps/{key}"]) for key in ("chosen", "rejected")}
    trainer._metrics["train"].clear()
    return {"loss": statistics.mean(losses), **found}


def compare(ours: dict[str, float], theirs: dict[str, float], precision: str) -> dict[str, Any]:
    """Both, how far they are apart, and whether that is within the bound."""
    bound = BOUND[precision]
    apart = {k: abs(ours[k] - theirs[k]) / (1.0 if k == "loss" else abs(ours[k])) for k in ours}
    agree = all(value <= bound["loss" if k == "loss" else "logps"] for k, value in apart.items())
    return {"megafuse": ours, "trl": theirs, "difference": apart, "bound": bound, "agree": agree}


def timed(
    trainer: Any, clock: Any, groups: SyntheticGroups, pairs: list[dict[str, Any]], args: argparse.Namespace, each: int
) -> dict[str, Any]:
    """Train, and say how fast; rates are those of the median step."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = np.diff(clock.marks)[args.warmup :].tolist()
    median = statistics.median(seconds)
    sizes = [[len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))] * 2 for r in pairs]
    computed = sum(max(map(max, sizes[i : i + each])) * 2 * each for i in range(0, len(sizes), each))
    return {
        "prompts": len(groups),
        "pairs": len(pairs),
        "tokens": int(groups.group_lengths.sum()),
        "tokens_computed": computed,
        "step_seconds": median,
        "step_seconds_all": seconds,
        "prompts_per_second": len(groups) / median,
        "responses_per_second": 2 * len(pairs) / median,
        "tokens_per_second": float(groups.group_lengths.sum()) / median,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }


if __name__ == "__main__":
    sys.exit(main())
