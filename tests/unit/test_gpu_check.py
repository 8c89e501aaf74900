"""What `make gpu-check` does with runs that raise, differ or come too late: tried on the CPU, with real runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.testing import gpu_check
from megafuse.testing.gpu_check import FAILED, NO_DEVICE, PASSED, SMOOTH_STEPS, TOLERANCE, check, main
from megafuse.testing.parity import STEPS, Lab
from megafuse.training import loop
from megafuse.training import run as train_module

# `--device cpu` hides the device from a process that has not asked for it yet; this one has, in tests/conftest.py
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tries the check on a CPU, without CUDA")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what `--device cpu` sets is taken back behind the test


def on_cpu(out: Path, *losses: str, more: tuple[str, ...] = ()) -> int:
    return main(["--out", str(out), "--device", "cpu", "--precisions", "fp32", "--losses", *losses, *more])


def test_one_run_that_raises_and_one_out_of_bounds_leave_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, step, exact = tmp_path / "new" / "report.json", loop.train_step, gpu_check.oracle_steps
    seen: dict[str, Any] = {}

    def breaks(engine: Any, topology: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        if loss.kind == "pair" and not seen:
            seen.update(json.loads(out.read_text()))
            raise AssertionError
        return step(engine, topology, loss, *args, **kwargs)

    def wrong(folder: Path, config: Any, steps: int) -> Any:
        found = exact(folder, config, steps)
        shift = 1 + 3 * TOLERANCE["fp32"] if config.loss.name == "simpo" else 1.0
        return [type(s)(s.loss, s.grad_norm * shift, s.magnitude) for s in found]

    monkeypatch.setattr(loop, "train_step", breaks)
    monkeypatch.setattr(gpu_check, "oracle_steps", wrong)
    assert on_cpu(out, "sft", "dpo", "simpo", "rloo") == FAILED
    # what was there when the second run raised
    assert list(seen["results"]) == ["sft/fp32/torch"] and not seen["complete"] and seen["device"] == "cpu"
    report = json.loads(out.read_text())
    sft, dpo, simpo, rloo = report["results"].values()
    assert report["complete"] and sft["ok"] and rloo["ok"]
    assert max(sft["loss"], sft["grad_norm"]) < 1e-5 and sft["bound"] == TOLERANCE["fp32"]
    assert dpo["error"].startswith("AssertionError") and not dpo["ok"]
    assert simpo["loss"] < 1e-5 and simpo["grad_norm"] == pytest.approx(3e-4, rel=0.1) and not simpo["ok"]
    said = capsys.readouterr()
    assert said.out.count("OUT OF BOUNDS") == 1 and said.out.count("FAILED") == 1 and "2 of 4 runs ok" in said.out
    assert "in breaks" in said.err  # the traceback


def test_a_piece_that_passes_and_a_step_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_cpu(tmp_path / "a.json", "sft", more=("--seed", "5")) == PASSED
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 5
    read = gpu_check.read_metrics
    lost = {"grad_norm": None, "nonfinite": ["grad_norm"]}
    monkeypatch.setattr(gpu_check, "read_metrics", lambda path: [{**r, **lost} for r in read(path)])
    assert on_cpu(tmp_path / "b.json", "sft") == FAILED
    assert (
        "NonFiniteError: step 1" in json.loads((tmp_path / "b.json").read_text())["results"]["sft/fp32/torch"]["error"]
    )


def test_no_run_begins_after_the_limit(tmp_path: Path) -> None:
    assert on_cpu(tmp_path / "report.json", "sft", "dpo", more=("--seconds", "0")) == FAILED
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [r["error"] for r in results.values()] == ["not run: 0 s were over"] * 2


def test_says_so_without_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "report.json")]) == NO_DEVICE
    assert "there is none here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_norm_that_jumps_is_compared_where_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clipped ratio in bf16: a wrong norm of a later step is no verdict, one of the first step is, and any loss."""
    lab, exact = Lab(tmp_path, 7).prepare(), gpu_check.oracle_steps
    assert SMOOTH_STEPS == {("rloo_clipped", "bf16"): 1}
    monkeypatch.setattr(train_module, "train", lambda config: None)  # the oracle's own steps stand for the run's
    config = lab.config("rloo_clipped", "bf16-torch", model={"precision": "bf16", "layers": "torch"})
    steps = exact(lab.hf("rloo_clipped"), config, STEPS)
    monkeypatch.setattr(gpu_check, "oracle_steps", lambda *args: steps)

    def found(step: int, field: str, precision: str = "bf16") -> float:
        run = [{"step": i, "loss": s.loss, "grad_norm": s.grad_norm} for i, s in enumerate(steps)]
        run[step][field] *= 1.5
        monkeypatch.setattr(gpu_check, "read_metrics", lambda path: run)
        return max(check(lab, "rloo_clipped", precision, "torch").values())

    assert found(3, "grad_norm") == 0 < TOLERANCE["bf16"] < found(0, "grad_norm")
    assert found(3, "grad_norm", "fp32") == pytest.approx(0.5)
    assert found(3, "loss") > 0
