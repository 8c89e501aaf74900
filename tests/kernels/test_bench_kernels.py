"""The kernel benchmark: its providers compute what they say, and one that breaks costs its own row (small shapes)."""

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megafuse.testing import kernel_peers
from megafuse.testing.kernel_peers import (
    SHAPES,
    Operands,
    Provider,
    Shape,
    available,
    cut_cross_entropy,
    eager,
    prediction,
    preference,
    quack,
    response_lengths,
    torch_linear_cross_entropy,
)
from megafuse.testing.kernel_timer import LONGEST, SHORTEST, Timer, next_sleep

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
            master = o.hidden[o.device_rows] @ o.weight.t()
        o.logits = master.clone().requires_grad_() if provider.level == "logits" else None
        fact = bench.inspect(provider, o, backward)
        # Logits that were rounded to bfloat16 on the way are off by up to 2^-8 of their size, some 30 here.
        assert fact["max_error"] < (1e-5 if provider.name == "megafuse-triton" and provider.level == "linear" else 0.3)


def test_peers_find_everything_on_the_device(bench: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rows that are on the host; libraries that a CPU has not are torch's arithmetic behind their names."""

    def cce(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **more: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")

    def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cce(hidden, weight, targets).mean()

    names = {
        "cut_cross_entropy": {"linear_cross_entropy": cce},
        "quack": {},
        "quack.cross_entropy": {"cross_entropy": cce},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": chunked},
    }
    for name, found in names.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**found))
    shape = Shape("tiny", 16, 200)
    o = replace(bench.operands(shape, 24, 0.67, device, bench.head(shape, device)), rows=None)
    exact = (o.hidden[-16:].double() @ o.weight.double().t()).log_softmax(1)
    exact = exact.gather(1, o.labels[-16:, None]).squeeze(1)
    peers = [p for source in (lambda: eager(False), cut_cross_entropy, quack) for p in source() if p.level == "linear"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        peers += torch_linear_cross_entropy()
    assert {p.name for p in peers} >= {"torch-eager", "cce", "cce_exact", "quack"}
    for peer in peers:
        found = bench.step(peer, o, True).double()
        assert torch.allclose(found, -exact.mean() if peer.mean_only else exact, atol=0.3), peer.name
        assert o.hidden.grad is not None and not o.hidden.grad[:-16].any() and o.hidden.grad[-16:].any()


def test_the_loss_behind_the_log_probs_takes_its_responses_from_the_device(bench: Any, device: torch.device) -> None:
    shape = Shape("tiny", 16, 200)
    o = bench.operands(shape, 2048, 1.0, device, bench.head(shape, device))  # two pairs
    assert o.device_responses.unique(return_counts=True)[1].tolist() == response_lengths(2048) == [512] * 4
    (apart,) = (p for p in preference("torch") if p.name.endswith("apart"))
    with torch.no_grad():
        value = apart.call(o)
        assert not torch.equal(apart.call(replace(o, device_responses=3 - o.device_responses)), value)


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


class Clock(Timer):
    """Times on whatever device there is; `broken` says when the device is lost."""

    def __init__(self, device: torch.device, broken: Any = lambda: False):
        super().__init__(device)
        self.broken = broken

    def once(self, call: Any, key: Any) -> float:
        if self.device.type == "cuda":
            return super().once(call, key)
        self.late.setdefault(key, []).append(False)
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3

    def usable(self) -> bool:
        return super().usable() and not self.broken()


def compilation_error(o: Operands) -> torch.Tensor:
    """What Triton raises of a kernel that it cannot compile, made by Triton."""
    import triton
    from triton.compiler.errors import CompilationError

    assert not issubclass(CompilationError, RuntimeError) and triton.__version__
    raise CompilationError("def kernel():\n    broken", None, "cannot make broken")


def plant(error: Any, when: int = 0) -> Any:
    """A peer that raises at its call number `when`."""
    calls: list[int] = []

    def call(o: Operands) -> torch.Tensor:
        calls.append(0)
        if len(calls) > when:
            if callable(error):
                return error(o)
            raise error
        return o.hidden.sum() * 0

    return call


TINY = Shape("tiny", 16, 200)
PLANTED = {
    "compiles-not": (plant(compilation_error), "CompilationError: cannot make broken"),
    "old-signature": (plant(TypeError("unexpected keyword 'softcap'")), "TypeError: unexpected keyword 'softcap'"),
    "says-nothing": (plant(AssertionError()), "AssertionError"),
    "breaks-later": (plant(AssertionError("now"), when=2), "AssertionError: now"),
}


def test_a_broken_peer_costs_its_own_row(
    bench: Any,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "COPIED_BYTES", 1 << 16)
    good = [p for p in available()[0] if p.name in ("megafuse-torch", "torch-eager")]
    bad = [Provider(name, "linear", call, mean_only=True) for name, (call, _) in PLANTED.items()]
    out = tmp_path / "sub.json"
    result: dict[str, Any] = {"environment": {}, "absent": {}}
    assert bench.measure_all([*bad, *good], [(TINY, 12, 0.5), (TINY, 8, 1.0)], out, result, 3, Clock(device)) == 0
    report = json.loads(out.read_text())
    assert report["complete"] and len(report["cases"]) == 2
    for case in report["cases"]:
        rows = {(r["provider"], r["level"], r["backward"]): r for r in case["results"]}
        assert not case["cut"] and len(rows) == 2 * len(bad) + 2 * len(good)
        for (name, _, _), row in rows.items():
            if name in PLANTED:
                assert row["failed"].startswith(PLANTED[name][1].split(":")[0]) and "ms" not in row
                assert row["failed"].endswith(PLANTED[name][1].split(": ")[-1]), row
            else:
                assert row["rounds"] == 2 and row["ms"] > 0 and "host_bound" in row  # of 4, one found the facts
    said = capsys.readouterr().out
    assert said.count("failed: TypeError: unexpected keyword 'softcap'") == 4


def test_time_that_is_up_leaves_what_there_is(
    bench: Any, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COPIED_BYTES", 1 << 16)
    out, clock = tmp_path / "a.json", time.monotonic
    torch_ = [p for p in available()[0] if p.name == "megafuse-torch" and p.level == "linear"]
    ends = clock() + 3600
    asked: list[int] = []

    def later() -> float:  # the first case's third look at the clock is one too many
        asked.append(0)
        return clock() + (7200 if len(asked) > 4 else 0)

    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=later))
    todo = [(TINY, 12, 0.5), (TINY, 12, 1.0)]
    assert bench.measure_all(torch_, todo, out, {}, 30, Clock(device), ends) == 0
    report = json.loads(out.read_text())
    (case,) = report["cases"]
    assert case["cut"] and not report["complete"]
    assert sum("max_error" in r for r in case["results"]) == 2 and sum("ms" in r for r in case["results"]) == 1


def test_a_lost_device_ends_the_run_with_what_it_has(
    bench: Any, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COPIED_BYTES", 1 << 16)
    lost: list[int] = []

    def kill(o: Operands) -> torch.Tensor:
        lost.append(0)
        raise RuntimeError("an illegal memory access was encountered")

    out = tmp_path / "a.json"
    todo = [(TINY, 12, 0.5), (TINY, 12, 1.0)]
    providers = [Provider("kills", "linear", kill)]
    assert bench.measure_all(providers, todo, out, {}, 3, Clock(device, lambda: bool(lost))) == 1
    (case,) = json.loads(out.read_text())["cases"]
    assert len(lost) == 1 and case["cut"] and sum("failed" in r for r in case["results"]) == 1


def test_only_some_providers(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    providers, absent = available()
    assert {p.name for p in bench.chosen(providers, ["torch-eager"], absent)} == {"torch-eager"}
    with pytest.raises(SystemExit, match="2"):
        bench.chosen(providers, ["torch-eager", "torch-eagre"], absent)
    assert "--only torch-eagre: not here. Here: megafuse-torch," in capsys.readouterr().err


def test_a_peer_whose_import_breaks_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(kernel_peers, "quack", breaks)
    found, absent = available()
    assert absent["quack"].startswith("OSError") and not any(p.name == "quack" for p in found)


def test_the_device_sleeps_until_all_is_queued() -> None:
    assert next_sleep(SHORTEST, late=False) == SHORTEST and next_sleep(SHORTEST, late=True) == 2 * SHORTEST
    cycles = [SHORTEST]
    while cycles[-1]:
        cycles.append(next_sleep(cycles[-1], late=True))
    assert cycles[-2] == LONGEST and next_sleep(0, late=True) == 0
    timer = Timer(torch.device("cpu"))
    timer.late["a"] = [True, True, True, False, False, True]
    assert timer.host_bound("a", 6) and not timer.host_bound("a", 3) and not timer.host_bound("b", 3)


@pytest.mark.parametrize("late", [False, True])
def test_the_sleep_stands_before_the_first_event(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would be told to do, in order; the second call sleeps longer where the first came too late."""
    order: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append(self)

        def query(self) -> bool:
            order.append("query")
            return late

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 7.0

    class Cache:
        def zero_(self) -> None:
            order.append("flush")

    timer = Timer(torch.device("cpu"))
    timer._flush, timer._start, timer._end = Cache(), Event(enable_timing=True), Event(enable_timing=True)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(cycles))
    for cycles in (SHORTEST, 2 * SHORTEST if late else SHORTEST):
        order.clear()
        assert timer.once(lambda: order.append("call"), "key") == 7.0
        assert order == ["flush", cycles, timer._start, "call", timer._end, "query", "wait"]
    assert timer.late == {"key": [late, late]}


ON_A_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.timed
@ON_A_DEVICE
def test_times_are_the_devices_not_the_launches() -> None:
    """Sixty launches that do next to nothing: a millisecond of the host, a few microseconds each on the device."""
    timer, x = Timer(torch.device("cuda")), torch.zeros(8, device="cuda")

    def launches() -> None:
        for _ in range(60):
            x.add_(1)

    slow = timer.median(lambda: (time.sleep(0.001), launches()), 12)
    assert slow < 0.5  # the host slept a whole one
    key = object()
    for _ in range(12):
        timer.once(lambda: x.sum().item(), key)
    assert timer.host_bound(key, 4)


@pytest.mark.gpu
@pytest.mark.timed
@ON_A_DEVICE
def test_no_eager_call_waits_for_the_device(bench: Any, device: torch.device) -> None:
    timer, shape = Timer(device), Shape("tiny", 64, 512)
    o = bench.operands(shape, 512, 0.5, device, bench.head(shape, device))
    for provider in eager(False):
        o.logits = None
        if provider.level == "logits":
            o.logits = (o.hidden[o.device_rows] @ o.weight.t()).detach().requires_grad_()
        for backward in (False, True):
            key = (provider.name, provider.level, backward)
            for _ in range(12):
                timer.once(lambda: bench.step(provider, o, backward), key)  # noqa: B023
            assert not timer.host_bound(key, 4), key
