"""The flex benchmark on a CPU: rows, attentions, and the report; the times are those of nothing."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.model.attention import visible
from megafuse.testing.kernel_timer import Timer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ["--heads", "4", "2", "--head-dim", "8", "--dtype", "fp32", "--sources", "1", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_flex", ROOT / "bench" / "flex.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Clock(Timer):
    """The CPU's time; `lost` from the call of that number on."""

    lost = 1 << 30

    def once(self, call: Any, key: Any) -> float:
        began = time.perf_counter()
        call()
        self.lost -= 1
        return (time.perf_counter() - began) * 1e3

    def usable(self) -> bool:
        return self.lost > 0


def test_says_so_without_a_gpu(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["flex.py"])
    assert bench.main() == 2 and "there is none here" in capsys.readouterr().err


def test_rows_are_groups_that_share_their_prompt(bench: Any) -> None:
    segment, parent = bench.row(8192, 4, int(torch.randint(1 << 30, ())))
    used = int((segment >= 0).sum())
    assert (segment[:used] >= 0).all() and (parent[used:] == -1).all() and 8192 - used < 4 * (139 + 8 * 131)
    assert segment[:used].diff().clamp(min=0).sum() == segment.max() and (segment[:used].diff() >= 0).all()
    assert torch.equal(parent[:used], segment[:used] // 9 * 9)
    counts = segment[:used].bincount().view(-1, 9).double()
    assert 60 < counts[:, 0].mean() < 300 and 90 < counts[:, 1:].mean() < 190  # 139 and 131, of some 7 and 56
    with pytest.raises(ValueError, match="--tokens 128 is less than"):
        bench.row(128, 4, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the report on a CPU")
def test_every_attention_is_attention(bench: Any, tmp_path: Path) -> None:
    """On a CPU torch has no backward of flex: those cases are `failed`, with what was found before."""
    seed = int(torch.randint(1 << 30, ()))
    print("seed", seed)
    out = tmp_path / "flex.json"
    args = bench.arguments([*SHAPE, "--tokens", "1000", "1408", "--seed", str(seed), "--out", str(out)])
    assert bench.measure_all(args, Clock(torch.device("cpu")), "cpu") == 1
    report = json.loads(out.read_text())
    assert report["complete"] and [c["tokens"] for c in report["cases"]] == [1024] * 4 + [1408] * 4
    kinds = ["flex-dynamic", "flex-static", "flex-tiles", "sdpa"]
    assert sorted(c["attention"] for c in report["cases"][:4]) == kinds
    for case in report["cases"]:
        assert case["error"] < 1e-5 and case["forward_ms"] > 0 and case["padding"] < 1024
        if case["attention"] == "sdpa":
            assert case["backward_ms"] > 0 and "failed" not in case
        else:
            assert "does not support backward on CPU" in case["failed"] and "backward_ms" not in case
    # what all are compared with, in float64 by the definition
    segment, parent = bench.row(1024, 1, seed)
    q, k, v, _ = (x.detach().double() for x in bench.operands(args, 1024, torch.device("cpu")))
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~visible(segment, parent), -torch.inf)
    exact = scores.softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
    found = bench.reference(segment, parent, [q, k, v])
    assert torch.allclose(found.double(), exact, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the report on a CPU")
def test_what_is_cut_leaves_what_it_had(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = tmp_path / "flex.json", Clock(torch.device("cpu"))
    args = bench.arguments([*SHAPE, "--tokens", "512", "--out", str(out)])
    clock.lost = 1
    assert bench.measure_all(args, clock, "cpu") == 1  # an error has left the device useless
    assert len(json.loads(out.read_text())["cases"]) == 1
    monkeypatch.setattr(bench, "sdpa_attend", lambda *args: 1 / 0)  # not even anything to compare with
    args.seconds = 1e9
    assert bench.measure_all(args, Clock(torch.device("cpu")), "cpu") == 1
    assert [c["failed"] for c in json.loads(out.read_text())["cases"]] == ["ZeroDivisionError: division by zero"] * 4
    out.unlink()
    args.seconds = -1.0
    assert bench.measure_all(args, Clock(torch.device("cpu")), "cpu") == 1 and not out.exists()
