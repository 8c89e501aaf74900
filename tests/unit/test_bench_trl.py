"""TRL beside `megafuse bench`: the same pairs; and, where TRL is installed, the same loss."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.bench.lengths import PromptLengths
from megafuse.bench.synthetic import SyntheticGroups

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def peer() -> Any:
    spec = importlib.util.spec_from_file_location("bench_trl_dpo", ROOT / "bench" / "peers" / "trl_dpo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_pairs_are_those_of_the_groups(peer: Any) -> None:
    rng = np.random.default_rng()
    prompts = [
        PromptLengths(int(rng.integers(1, 9)), tuple((int(rng.integers(1, 9)), int(rng.integers(1, 9))) for _ in "ab"))
        for _ in range(5)
    ]
    groups = SyntheticGroups(prompts, 2, kind="pair", vocab_size=50, seed=3)
    rows = peer.pairs_of(groups)
    expected = [
        (groups[i].prompt.tolist(), groups[i].responses[2 * k].tolist(), groups[i].responses[2 * k + 1].tolist())
        for i in range(5)
        for k in range(2)
    ]
    assert sorted((r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows) == sorted(expected)
    for r in rows:
        assert r["ref_chosen_logps"] == pytest.approx(-math.log(50) * len(r["chosen_ids"]))
        assert r["ref_rejected_logps"] == pytest.approx(-math.log(50) * len(r["rejected_ids"]))
    padded = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    assert padded == sorted(padded)


def test_losses_that_differ_are_no_agreement(peer: Any) -> None:
    ours = {"loss": 0.7, "chosen": -700.0, "rejected": -800.0}
    assert peer.compare(ours, {**ours, "loss": 0.7 + 9e-6}, 1e-5)["agree"]
    assert not peer.compare(ours, {**ours, "loss": 0.7 + 2e-5}, 1e-5)["agree"]
    assert not peer.compare(ours, {**ours, "rejected": -800.02}, 1e-5)["agree"]
    assert not peer.compare(ours, {**ours, "chosen": math.nan}, 1e-5)["agree"]


def test_no_device_no_measurement(
    peer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["trl_dpo.py", "--data", "none.jsonl"])
    assert peer.main() == 2 and "there is none here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the comparison on a CPU")
def test_trl_computes_the_same_loss(peer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data, out = tmp_path / "scored.jsonl", tmp_path / "out.json"
    rng = np.random.default_rng()
    with data.open("w") as file:
        for i in range(6):
            responses = [
                {"source": f"s{j % 2}", "reward": rng.random(), "text": "word " * int(rng.integers(1, 9))}
                for j in range(4)
            ]
            file.write(json.dumps({"prompt_id": f"p{i}", "prompt": "word " * 7, "responses": responses}) + "\n")
    shape = ["--model", "tiny", "--device", "cpu", "--precision", "fp32", "--prompts", "4", "--sources", "2"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["trl_dpo.py", "--data", str(data), *shape, "--pairs-per-forward", "4", "--steps", "1", "--out", str(out)],
    )
    assert peer.main() == 0
    report = json.loads(out.read_text())
    assert report["first_step"]["agree"] and report["prompts_per_second"] > 0 and report["pairs"] == 8
    monkeypatch.setattr(peer, "BETA", 2 * peer.BETA)  # of both: still the same loss, another one than before
    assert peer.main() == 0
    assert json.loads(out.read_text())["first_step"]["trl"]["loss"] != report["first_step"]["trl"]["loss"]
