"""A sweep on this machine, for real: two alphas x two losses of a tiny model, one table; again: nothing to do."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megafuse.observe.metrics import read_metrics
from megafuse.testing.tiny import write_tiny_llama
from megafuse.testing.tokenizer import make_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
recipe = "fusepo_llama8b"
run = "sweep"
model = "hf"
data = ["scored.jsonl.gz"]
holdout = 0.25
env = ["TP=1", "HEALTH=off", "OMP_NUM_THREADS=1"]
[grid]
alpha = [1e-3, 10.0]
loss = ["ln_dpo", "simpo"]
[losses.ln_dpo]
beta = 10.0
[losses.simpo]
beta = 2.0
gamma = 0.5
[train]
max_steps = 3
global_batch_size = 8
"optim.lr" = 1e-3
"observe.tensorboard" = false
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_tiny_llama(root / "hf", seed=0, vocab=256, layers=1)
    make_tokenizer(root / "hf", vocab_size=256)
    rng = random.Random(1)
    with gzip.open(root / "scored.jsonl.gz", "wt") as file:
        for i in range(60):
            responses = [
                {"source": source, "text": rng.choice(letters) * 6, "reward": reward + rng.random() / 100}
                for source, best in (("alpha", 0.9), ("beta", 0.5))
                for letters, reward in (("0123456789", best), ("abcxyz", 0.1))
            ]
            file.write(json.dumps({"prompt_id": f"p{i}", "prompt": f"Count to {i}", "responses": responses}) + "\n")
    (root / "sweep.toml").write_text(
        SWEEP.replace('"hf"', f'"{root}/hf"').replace('"sweep"', f'"{root}/sweep"').replace('"sc', f'"{root}/sc')
    )
    (root / "bin").mkdir()
    for name, module in {"megafuse": "megafuse", "torchrun": "torch.distributed.run"}.items():
        path = root / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        path.chmod(0o755)
    return root


def command(root: Path) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment = {**kept, "PATH": os.pathsep.join([str(root / "bin"), os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    line = ["megafuse", "launch", "sweep", "sweep.toml", "--on", "local", "--via", "plain"]
    return subprocess.run(line, env=environment, cwd=root, capture_output=True, text=True, timeout=1400)


def test_two_alphas_and_two_losses(root: Path) -> None:
    done = command(root)
    logs = {path.stem: path.read_text()[-3000:] for path in (root / "sweep").glob("*/*.out")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    rows = {row["point"]: row for row in json.loads((root / "sweep" / "summary.json").read_text())}
    names = [f"alpha-{alpha}_loss-{loss}" for alpha in ("0.001", "10.0") for loss in ("ln_dpo", "simpo")]
    assert list(rows) == names
    for name, row in rows.items():
        records = read_metrics(root / "sweep" / name / "train")
        assert row["status"] == "done" and row["steps"] == len(records) == 3
        assert row["loss"] == pytest.approx(sum(record["loss"] for record in records) / 3, rel=1e-12)
        assert row["margin"] is not None and row["tokens_per_second"] > 0
        accuracy = json.loads((root / "sweep" / name / "eval" / "accuracy.json").read_text())
        assert row["intra"] == accuracy["intra"] and 0 <= row["cross"] <= 1
    # a step of the two alphas differs, and so do the two losses; equal data and models are not made twice
    first = {name: read_metrics(root / "sweep" / name / "train")[-1]["loss"] for name in names}
    assert len(set(first.values())) == 4
    shared = root / "sweep" / names[1]
    assert (shared / "dataset").is_symlink() and (shared / "reference").is_symlink()
    assert (
        not (root / "sweep" / names[2] / "dataset").is_symlink() and (root / "sweep" / names[2] / "model").is_symlink()
    )
    held_out = json.loads((shared / "rank" / "manifest.json").read_text())
    trained = json.loads((shared / "dataset" / "manifest.json").read_text())
    assert held_out["groups"] > 5 and trained["groups"] + held_out["groups"] <= 60
    before = {path: path.stat().st_mtime_ns for path in (root / "sweep").glob("*/train/metrics.jsonl")}
    again = command(root)
    assert again.returncode == 0 and "4 points, 0 to start" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
