"""The kernel benchmark: refuses to run without a GPU, and its providers compute what they say (small shapes)."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.testing.kernel_peers import Shape, available

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
    assert {p.name for p in providers} >= {"megafuse-triton", "megafuse-torch", "torch-eager"}
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
