"""The kernel benchmark: refuses to run without a GPU, and its providers compute what they say (small shapes)."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.testing.kernel_peers import SHAPES, Shape, available, prediction, preference

BENCH = Path(__file__).resolve().parents[2] / "bench" / "kernels.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_says_so_without_a_gpu(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--out", str(tmp_path)])
    assert bench.main() == 2
    assert "there is none here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_floors(bench: Any) -> None:
    limits = {"copy_gb_s": 3000.0, "read_logits": 0.7, "h_wt": 10.8, "e_w": 10.0, "et_x": 11.0}
    assert bench.floor("logits", False, limits) == 0.7
    assert bench.floor("logits", True, limits) == pytest.approx(2.1)
    assert bench.floor("linear", False, limits) == 10.8
    assert bench.floor("linear", True, limits) == pytest.approx(31.8)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_providers_agree_with_float64(softcap: float | None, bench: Any, device: torch.device) -> None:
    shape = Shape("tiny", 16, 200, softcap)
    o = bench.operands(shape, 12, 0.5, device, bench.head(shape, device))
    providers, absent = available()
    assert {p.name for p in providers} >= {"megafuse-triton", "megafuse-triton-simpo", "megafuse-torch", "torch-eager"}
    assert all(absent.values())
    for provider, backward in bench.attempts([p for p in providers if p.name != "torch-compile"], shape):
        if provider.mean_only or not (provider.name.startswith(("megafuse", "torch"))):
            continue
        with torch.no_grad():
            master = o.hidden[o.rows.to(device)] @ o.weight.t()
        o.logits = master.clone().requires_grad_() if provider.level == "logits" else None
        fact = bench.inspect(provider, o, backward)
        # Logits that were rounded to bfloat16 on the way are off by up to 2^-8 of their size, some 30 here.
        assert fact["max_error"] < (1e-5 if provider.name == "megafuse-triton" and provider.level == "linear" else 0.3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_inside_and_apart_are_the_same_loss(backend: str, bench: Any, device: torch.device) -> None:
    shape = Shape("tiny", 16, 200)
    o = bench.operands(shape, 12, 0.5, device, bench.head(shape, device))
    inside, apart = preference(backend)
    found = []
    for provider in (inside, apart):
        value = bench.step(provider, o, True)
        assert o.hidden.grad is not None and o.weight.grad is not None
        found.append((value, o.hidden.grad.clone(), o.weight.grad.clone()))
        assert torch.allclose(bench.step(provider, o, False), value, rtol=1e-6)
    assert all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-5) for a, b in zip(*found))
    assert found[0][2].any()


def test_prediction(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llama = prediction(SHAPES[0], 8192)
    assert llama["products_inside"] == 3 and llama["products_apart"] == 3.5 and llama["chunks"] == 2
    assert 1.0 < llama["workspace_gb"] < 1.1
    assert all(prediction(s, n)["workspace_gb"] < 1.1 for s in SHAPES for n in (2048, 8192, 32768))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--predict", "--shapes", "smollm2"])
    assert bench.main() == 0 and len(capsys.readouterr().out.splitlines()) == 6
