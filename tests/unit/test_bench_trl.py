"""TRL beside `megafuse bench`: the same pairs; and, where TRL is installed, the same loss."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
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


@pytest.mark.parametrize(("precision", "loss", "logps"), [("fp32", 1e-5, 1e-5), ("bf16", 2e-2, 5e-4)])
def test_losses_that_differ_are_no_agreement(peer: Any, precision: str, loss: float, logps: float) -> None:
    ours = {"loss": 0.7, "chosen": -700.0, "rejected": -800.0}

    def agree(**theirs: float) -> bool:
        return peer.compare(ours, {**ours, **theirs}, precision)["agree"]

    assert agree(loss=0.7 + 0.9 * loss) and not agree(loss=0.7 - 1.1 * loss)
    assert agree(rejected=-800 * (1 + 0.9 * logps)) and not agree(rejected=-800 * (1 + 1.1 * logps))
    assert not agree(chosen=math.nan)


def test_rounding_agrees_and_twice_the_beta_does_not(peer: Any) -> None:
    """A random model's pairs at Llama 3.2 1B's width: a logit has the deviation 0.02 x sqrt(2048), a response of 131
    tokens sums as many. The noise of bf16 in the mean loss of 256 pairs stays within the bound at six deviations."""
    rng = np.random.default_rng()
    margins = 0.02 * 2048**0.5 * (131 * 2) ** 0.5 * rng.standard_normal(256)

    def mean_loss(beta: float) -> float:
        return float(np.logaddexp(0, -beta * margins).mean())

    assert 6 * 1.7e-3 < peer.BOUND["bf16"]["loss"] < 0.2 * (mean_loss(2 * peer.BETA) - mean_loss(peer.BETA))


def test_no_device_no_measurement(
    peer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["trl_dpo.py", "--data", "none.jsonl"])
    assert peer.main() == 2 and "there is none here" in capsys.readouterr().err


@pytest.fixture
def flags(peer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command line of a tiny comparison with 4 and 2 pairs a forward; its OUT."""
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
    more = ["--pairs-per-forward", "4", "2", "--steps", "1", "--warmup", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["trl_dpo.py", "--data", str(data), *shape, *more])
    return out


ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tries the comparison on a CPU")


@ON_A_CPU
def test_trl_computes_the_same_loss(peer: Any, flags: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    assert peer.main() == 0
    report = json.loads(flags.read_text())
    assert report["complete"] and report["first_step"]["agree"]
    assert [r["pairs_per_forward"] for r in report["results"]] == [4, 2]
    assert all(r["prompts_per_second"] > 0 and r["pairs"] == 8 for r in report["results"])
    monkeypatch.setattr(peer, "BETA", 2 * peer.BETA)  # of both: still the same loss, another one than before
    assert peer.main() == 0
    assert json.loads(flags.read_text())["first_step"]["trl"]["loss"] != report["first_step"]["trl"]["loss"]
    theirs = peer.their_first_step
    for precision in ("fp32", "bf16"):  # another loss of TRL alone: caught, and measured all the same
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--precision", precision])
        monkeypatch.setattr(peer, "their_first_step", lambda trainer, n: theirs(ipo(trainer), n))
        assert peer.main() == 1
        report = json.loads(flags.read_text())
        assert not report["first_step"]["agree"] and all(r["prompts_per_second"] > 0 for r in report["results"])
        assert report["first_step"]["difference"]["chosen"] <= peer.BOUND[precision]["logps"]
        monkeypatch.setattr(peer, "their_first_step", theirs)
        assert peer.main() == 0


def ipo(trainer: Any) -> Any:
    """With IPO's loss: some 1 / (2 beta)^2 of a model that knows nothing, whatever its margins are. (Twice the beta
    would move the loss by the mean margin of eight pairs, which now and then is within the bound.)"""
    trainer.loss_types = ["ipo"]
    return trainer


class Stand:
    """In TRL's place: a trainer that does nothing, with the number of pairs a forward that it was made with."""

    def __init__(self, each: int) -> None:
        self.each, self.marks = each, [0.0]

    def train(self) -> None:
        if self.each == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.marks += [3.0, 4.0]


@ON_A_CPU
@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_what_raises_and_what_disagrees_is_recorded(
    peer: Any, flags: Path, wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four pairs a forward run out of memory, two do not; the first step of megafuse is a real one, TRL's is given."""
    seen: list[dict[str, Any]] = []
    ours = peer.our_first_step
    given: dict[str, float] = {}

    def first(*args: Any) -> dict[str, float]:
        given.update(ours(*args))
        return dict(given)

    def stand(*args: Any) -> tuple[Stand, Stand]:
        seen.append(json.loads(flags.read_text()))
        return (trainer := Stand(args[-1])), trainer

    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__="0"))
    monkeypatch.setattr(peer, "our_first_step", first)
    monkeypatch.setattr(peer, "make_trainer", stand)
    monkeypatch.setattr(peer, "their_first_step", lambda *_: {**given, "loss": given["loss"] + wrong})
    assert peer.main() == 1
    report = json.loads(flags.read_text())
    assert seen[0]["results"] == [] and seen[0]["first_step"] is None
    assert seen[1]["first_step"]["agree"] == (not wrong) and not seen[1]["complete"]
    failed = {"pairs_per_forward": 4, "failed": "OutOfMemoryError: CUDA out of memory."}
    assert seen[1]["results"] == [failed] == report["results"][:1]
    assert report["complete"] and report["first_step"]["agree"] == (not wrong)
    assert report["results"][1]["pairs_per_forward"] == 2 and report["results"][1]["step_seconds"] == 1.0
    assert "OutOfMemoryError" in capsys.readouterr().err
    monkeypatch.setattr(Stand, "train", lambda self: self.marks.extend([3.0, 4.0]))  # now nothing raises
    assert peer.main() == (1 if wrong else 0)
    times = json.loads(flags.read_text())["results"]
    assert [r["step_seconds"] for r in times] == [1.0, 1.0]
    monkeypatch.setattr(peer, "our_first_step", lambda *_: 1 / 0)  # no comparison, the times all the same
    assert peer.main() == 1
    last = json.loads(flags.read_text())
    assert last["first_step"] == {"failed": "megafuse: ZeroDivisionError: division by zero", "agree": False}
    assert len(last["results"]) == 2 and last["complete"]
