"""Qwen3-MoE through megatron-core against transformers, and what must not pass."""

import json
import os

import pytest

from megafuse.converters.importer import import_hf
from megafuse.converters.logits import compare_logits
from megafuse.errors import IntegrityError
from megafuse.model.norm import RMSNorm
from megafuse.testing.tiny import write_tiny_qwen3_moe

BOUND = 2e-6  # of the largest logit, in fp32
HEAD_DIM = 12  # of the tiny model


def seed() -> int:
    value = int.from_bytes(os.urandom(4), "little")
    print("seed", value)
    return value


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_moe_logits(tmp_path, norm_topk_prob, tied):
    hf = write_tiny_qwen3_moe(tmp_path / "hf", seed=seed(), norm_topk_prob=norm_topk_prob, tied=tied)
    import_hf(hf, tmp_path / "ckpt")
    report = compare_logits(tmp_path / "ckpt", hf, tokens=200)
    # of two logits closer than the bound either may be the largest: a tie is no fault
    assert report.difference < BOUND * report.largest and report.agree >= 0.99
    config = json.loads((hf / "config.json").read_text())
    for change in ({"norm_topk_prob": not norm_topk_prob}, {"num_experts_per_tok": 3}):
        (hf / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(IntegrityError, match="different logits"):
            compare_logits(tmp_path / "ckpt", hf, tokens=200)


def test_without_its_qk_norm_it_is_another_model(tmp_path, monkeypatch):
    hf = write_tiny_qwen3_moe(tmp_path / "hf", seed=seed())
    import_hf(hf, tmp_path / "ckpt")
    normalise = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x if x.size(-1) == HEAD_DIM else normalise(self, x))
    with pytest.raises(IntegrityError, match="different logits"):
        compare_logits(tmp_path / "ckpt", hf, tokens=50)
