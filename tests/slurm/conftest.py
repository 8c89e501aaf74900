"""One real Slurm a session, and inputs for the scripts."""

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megafuse.testing.slurm_cluster import NoSlurm, SlurmCluster
from megafuse.testing.tiny import write_tiny_llama
from megafuse.testing.tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 256
SOURCES = ("alpha", "beta")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    found = SlurmCluster(tmp_path_factory.mktemp("slurm") / "lab")
    for folder in found.lab.parents:  # munge's socket is refused in folders that others cannot enter
        if folder.name.startswith(("slurm", "pytest", "popen")):
            folder.chmod(0o755)
    try:
        found.start()
    except (NoSlurm, TimeoutError) as reason:
        pytest.skip(f"no real Slurm: {reason}")
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`megafuse` and `torchrun` of this interpreter, for a PATH."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in {"megafuse": "megafuse", "torchrun": "torch.distributed.run"}.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and scored.jsonl.gz: every source has a good and a bad answer to each of 200 prompts."""
    root = tmp_path_factory.mktemp("inputs")
    write_tiny_llama(root / "hf", seed=0, vocab=VOCAB, layers=1)
    make_tokenizer(root / "hf", vocab_size=VOCAB)
    rng = random.Random(1)
    with gzip.open(root / "scored.jsonl.gz", "wt") as file:
        for i in range(200):
            responses = [
                {"source": source, "text": rng.choice(letters) * 6, "reward": reward + rng.random() / 100}
                for source in SOURCES
                for letters, reward in (("0123456789", 0.9), ("abcxyz", 0.1))
            ]
            file.write(json.dumps({"prompt_id": f"p{i}", "prompt": f"Count to {i}", "responses": responses}) + "\n")
    return root


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `torchrun` that fails at once and an `nvidia-smi` that sees GPUS GPUs, for tests that never come to train."""
    folder = tmp_path_factory.mktemp("stand-ins")
    bodies = {
        "torchrun": 'echo "cannot train"; exit 9',
        "nvidia-smi": 'if [ "$1" = -L ]; then i=0; while [ $i -lt "$GPUS" ]; do echo "GPU $i: x"; i=$((i+1)); done; fi',
    }
    for name, body in bodies.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    return folder
