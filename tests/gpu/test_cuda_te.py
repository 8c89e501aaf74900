"""Transformer Engine's flavour of every family on a CUDA device: transformers' logits, and the oracle's losses.

Its names, shapes and checkpoints need no GPU: tests/te.
"""

import os
from pathlib import Path

import pytest

from megafuse.checkpoint.state import load_model
from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.converters.importer import import_hf
from megafuse.converters.logits import compare, huggingface_logits, mcore_logits, random_tokens
from megafuse.model.arch import read_arch
from megafuse.model.build import build_model, choose_backend, te_usable
from megafuse.parallel.topology import layout, process_groups
from megafuse.testing.families import WRITERS
from megafuse.testing.gpu_check import TOLERANCE, check
from megafuse.testing.parity import LOSSES, Lab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not te_usable(), reason="needs a CUDA device and Transformer Engine"),
]
TOKENS = 160  # windows are of 8 tokens, the knee of the rope scaling is at 16, its original context has 64
BOUND = 1e-4  # of the largest logit: fp32 in other summation orders; a wrong epsilon or window gives 1e-3 and more


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    heads = {"head_dim": 32} if family in ("gemma2", "qwen3", "qwen3_moe") else {}
    hf = WRITERS[family](tmp_path / "hf", seed=seed, hidden=128, heads=4, kv_heads=2, vocab=128, **heads)
    import_hf(hf, tmp_path / "ckpt")
    arch, parallel = read_arch(hf), ParallelConfig()
    ids = random_tokens(arch, TOKENS, seed)
    settings = ModelConfig(path=tmp_path / "ckpt", precision="fp32", layers="te", attention="sdpa")
    backend = choose_backend(settings, parallel, head_dim=arch.head_dim, prefix_sharing=True)
    with process_groups(), layout(parallel) as topology:
        model = build_model(arch, parallel, topology, backend)
        load_model(model, topology, tmp_path / "ckpt")
        ours = mcore_logits(model, topology, arch, parallel, ids)
    assert ours is not None
    report = compare(ours, huggingface_logits(hf, ids), len(ids))
    assert report.relative <= BOUND, report


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(Path(tmp_path_factory.mktemp("te")), int.from_bytes(os.urandom(4), "little")).prepare()


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("loss", LOSSES)
def test_training_equals_the_oracle(lab: Lab, loss: str, precision: str) -> None:
    found = check(lab, loss, precision, "te")
    assert max(found.values()) <= TOLERANCE[precision], found
