"""The whole way through the command line on a tiny model: scored answers in, a Hugging Face folder out."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megafuse.checkpoint.folder import complete_steps, step_name
from megafuse.observe.metrics import read_metrics
from megafuse.testing.tiny import write_tiny_llama
from megafuse.testing.tokenizer import make_tokenizer

pytestmark = pytest.mark.e2e

VOCAB = 256


def scored_prompt(i: int, rng: random.Random) -> dict[str, object]:
    """Two sources with three answers each; digits are good answers, letters are bad ones."""
    responses = []
    for source in ("alpha", "beta"):
        for _ in range(3):
            digits = rng.randint(0, 6)
            text = "".join(rng.choice("0123456789") for _ in range(digits))
            text += "".join(rng.choice("abcxyz") for _ in range(6 - digits))
            responses.append({"source": source, "text": text, "reward": digits / 6 + rng.random() / 100})
    return {"prompt_id": f"p{i}", "prompt": f"Count to {i}", "domain": "math", "responses": responses}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    write_tiny_llama(root / "hf", seed=0, vocab=VOCAB)
    make_tokenizer(root / "hf", vocab_size=VOCAB)
    rng = random.Random(1)
    with gzip.open(root / "scored.jsonl.gz", "wt") as file:
        for i in range(60):
            file.write(json.dumps(scored_prompt(i, rng)) + "\n")
    return root


def command(*words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """One `megafuse` command; under torchrun with several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [sys.executable, *(launcher if processes > 1 else []), "-m", "megafuse", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280)


def must(*words: object, processes: int = 1) -> str:
    done = command(*words, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(root: Path, kind: str) -> Path:
    out = root / kind
    must("build", "--inputs", root / "scored.jsonl.gz", "--output", out, "--tokenizer", root / "hf", "--kind", kind,
         "--holdout", 0.2, "--alpha" if kind != "rank" else "--seed", 1 if kind != "rank" else 0)  # fmt: skip
    return out


def train(root: Path, name: str, model: Path, data: Path, *flags: object, processes: int) -> Path:
    fixed = ["--data.max_row_tokens", 512, "--global_batch_size", 8, "--optim.lr", 5e-3, "--model.precision", "fp32"]
    paths = ["--run_dir", root / name, "--model.path", model, "--data.dataset", data]
    must("train", *paths, *fixed, *flags, processes=processes)
    checkpoints = root / name / "checkpoints"
    return checkpoints / step_name(complete_steps(checkpoints)[-1])


def test_from_scored_answers_to_a_model_that_prefers_the_better_ones(root: Path) -> None:
    sft, pair, rank = (build(root, kind) for kind in ("sft", "pair", "rank"))
    model = root / "model"
    must("convert", "import", root / "hf", model)

    def accuracy(checkpoint: Path, name: str) -> float:
        must("eval", "--out", root / name, "--model.path", checkpoint, "--data.dataset", rank, processes=2)
        return float(json.loads((root / name / "accuracy.json").read_text())["intra"])

    before = accuracy(model, "eval-before")
    tuned = train(root, "sft-run", model, sft, "--loss.name", "sft", "--epochs", 3, processes=2)
    precision = ("--model.precision", "fp32")
    must("reference", "--out", root / "ref", "--model.path", tuned, "--data.dataset", pair, *precision, processes=2)
    po = ("--loss.name", "dpo", "--loss.beta", 0.1, "--epochs", 3)
    # the cache was written by two data-parallel processes and is read by two pipeline stages
    final = train(
        root, "po-run", tuned, pair, *po, "--reference.path", root / "ref", "--parallel.pipeline", 2, processes=2
    )
    first = read_metrics(root / "po-run")[0]
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert accuracy(final, "eval-after") > max(before, 0.7)

    # without a cache the run computes the same reference itself
    train(root, "po-alone", tuned, pair, *po, "--max_steps", 1, processes=1)
    assert read_metrics(root / "po-alone")[0]["loss"] == pytest.approx(first["loss"], abs=1e-6)

    must("convert", "export", final, root / "out")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "out")
    exported = AutoModelForCausalLM.from_pretrained(root / "out").eval()
    prompt = tokenizer("Count", return_tensors="pt").input_ids
    assert exported.generate(prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt.shape[1]
    weights = AutoModelForCausalLM.from_pretrained(root / "hf").state_dict()
    assert not all(torch.equal(v, exported.state_dict()[k]) for k, v in weights.items())

    stale = command("train", "--run_dir", root / "stale", "--model.path", model, "--data.dataset", pair, *po,
                    "--optim.lr", 1e-3, "--reference.path", root / "ref", *precision)  # fmt: skip
    assert stale.returncode == 3 and "  weights: the reference model's weights" in stale.stderr
    assert "  data:" not in stale.stderr and "Traceback" not in stale.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--optim.lrr", "1"], r"optim\.lr"),
        (["train", "nothere.toml"], r"nothere\.toml"),
        (["trian"], "train"),
        (
            ["build", "--inputs", "absent.jsonl", "--output", "o", "--tokenizer", "t", "--kind", "sft"],
            r"absent\.jsonl|\bt\b",
        ),
    ],
)
def test_bad_input_is_one_clear_message(words: list[str], says: str, tmp_path: Path) -> None:
    done = command(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(says, done.stdout + done.stderr), done.stdout + done.stderr
