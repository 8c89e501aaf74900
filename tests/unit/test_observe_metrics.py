import json
import math
import os
import random
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.metrics import MetricsLog, read_metrics


def record(step: int, **more: Any) -> dict[str, Any]:
    base = {"step": step, "loss": 1.0 / step, "grad_norm": 0.5, "lr": 1e-6, "prompts": 128, "tokens": 1000}
    return base | {"tokens_computed": 700, "tokens_per_second": 9.5, "step_seconds": 0.1} | more


def written(run: Path, steps: range, resume_step: int = 0) -> bytes:
    with MetricsLog(run, resume_step=resume_step, tensorboard=False) as log:
        for step in steps:
            log.log(record(step))
    return (run / "metrics.jsonl").read_bytes()


def test_every_float_reads_back_bit_equal(tmp_path: Path) -> None:
    bits = [struct.unpack("<d", os.urandom(8))[0] for _ in range(500)]
    values = [v for v in bits if math.isfinite(v)] + [-0.0, 5e-324, 0.1 + 0.2]
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        for step, value in enumerate(values, start=1):
            log.log(record(step, x=value, y=np.float32(value % 1), z=torch.tensor(value, dtype=torch.float64)))
    back = read_metrics(tmp_path)
    assert [struct.pack("<d", r["x"]) for r in back] == [struct.pack("<d", v) for v in values]
    assert [r["y"] for r in back] == [float(np.float32(v % 1)) for v in values]
    assert [struct.pack("<d", r["z"]) for r in back] == [struct.pack("<d", v) for v in values]


def test_not_finite_is_null_and_named_and_the_line_is_strict_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        log.log(record(1, loss=float("nan"), margin=float("-inf"), ok=True, skipped=None, note="x"))

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    back = json.loads(line, parse_constant=refuse)
    assert back["loss"] is None and back["margin"] is None and back["nonfinite"] == ["loss", "margin"]
    assert back["ok"] is True and back["skipped"] is None and back["note"] == "x"
    assert "nonfinite" not in record(2)


def test_each_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.log(record(step))
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    log.sync()
    log.close()
    log.close()


def test_resuming_cuts_back_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    straight = written(tmp_path / "a", range(1, 21))
    for resume_step in (0, 7, 20):
        run = tmp_path / f"b{resume_step}"
        written(run, range(1, 21))
        assert written(run, range(resume_step + 1, 21), resume_step) == straight
        assert sorted(os.listdir(run)) == ["metrics.jsonl"]


def test_a_kill_at_any_byte_of_the_last_line_is_healed(tmp_path: Path) -> None:
    whole = written(tmp_path, range(1, 4))
    start = whole[:-1].rfind(b"\n") + 1
    path = tmp_path / "metrics.jsonl"
    for cut in (*range(start, len(whole), 9), len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [r["step"] for r in read_metrics(path)] == [1, 2]
        assert written(tmp_path, range(3, 4), resume_step=2) == whole
        path.write_bytes(whole[:cut])  # the checkpoint is newer than the last whole line: nothing may be glued to it
        written(tmp_path, range(4, 5), resume_step=3)
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 4]


def test_killed_for_real_then_resumed(tmp_path: Path) -> None:
    """kill -9 at a random moment of a fast writer, several times; every step stands once at the end."""
    code = (
        "import sys; from megafuse.observe.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], resume_step=int(sys.argv[2]), tensorboard=False)\n"
        "fields = 'loss grad_norm lr prompts tokens tokens_computed tokens_per_second step_seconds'.split()\n"
        "for step in range(int(sys.argv[2]) + 1, 10**9):\n"
        "    log.log({'step': step, **dict.fromkeys(fields, 1 / step)})\n"
        "    if step % 50 == 0: print(step, flush=True)\n"
    )
    resume = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(resume)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(random.randint(1, 20)):
            resume = int(process.stdout.readline())
        process.kill()
        process.wait()
        process.stdout.close()
        found = [r["step"] for r in read_metrics(tmp_path)]
        assert found == list(range(1, len(found) + 1)) and len(found) >= resume
    MetricsLog(tmp_path, resume_step=resume, tensorboard=False).close()
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, resume + 1))


def test_refusals(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_step=4, tensorboard=False) as log:
        with pytest.raises(ValueError, match="step 4 is not later than step 4"):
            log.log(record(4))
        log.log(record(5))
        with pytest.raises(ValueError, match="step 5 is not later"):
            log.log(record(5))
        with pytest.raises(ValueError, match="lacks lr, tokens"):
            log.log({k: v for k, v in record(6).items() if k not in ("lr", "tokens")})
        with pytest.raises(TypeError, match="'bad' is a list"):
            log.log(record(6, bad=[1]))
    assert [r["step"] for r in read_metrics(tmp_path)] == [5]
    with pytest.raises(ValueError, match="resume_step is -1"):
        MetricsLog(tmp_path, resume_step=-1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step": 1}\ngarbage\n{"step": 2}\n', "line 2 is not a JSON object"),
        (b'{"loss": 1}\n', "line 1 has no step"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"step": 1}\n{"step": 1}\n', "line 2 is step 1 after step 1"),
    ],
)
def test_damage_is_named_and_never_overwritten(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        read_metrics(path)
    with pytest.raises(IntegrityError, match=message):
        MetricsLog(tmp_path, resume_step=0)
    assert path.read_bytes() == content


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path)


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with MetricsLog(run, resume_step=0, writer=False, wandb=True) as log:
        log.log({})
        log.sync()
    assert not run.exists()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
    from tensorboard.util.tensor_util import make_ndarray

    for start, offset in ((0, 0.0), (3, 100.0)):
        with MetricsLog(tmp_path, resume_step=start) as log:
            for step in range(start + 1, 7):
                log.log(record(step, loss=step + offset, **{"kernel/ms": 1.5}))
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]
    programs = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))  # what scripts read with
    programs.Reload()
    assert [(e.step, e.value) for e in programs.Scalars("train/loss")] == expected
    assert "kernel/ms" in programs.Tags()["scalars"] and "train/step" not in programs.Tags()["scalars"]
    browser = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))  # what the web page shows
    browser.Reload()
    assert [(e.step, float(make_ndarray(e.tensor_proto))) for e in browser.Tensors("train/loss")] == expected


class _FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: list[Any] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_resumes_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    runs: list[_FakeRun] = []

    def init(**settings: Any) -> _FakeRun:
        asked.append(settings)
        runs.append(_FakeRun())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 2):
        with MetricsLog(tmp_path, resume_step=start, tensorboard=False, wandb={"project": "p"}) as log:
            log.log(record(start + 1, note="text"))
    assert asked[0] == asked[1] and asked[0]["resume"] == "allow" and asked[0]["project"] == "p"
    assert runs[1].logged == [record(3)] and runs[1].axes[-1] == ("*", "step") and runs[1].finished


def test_wandb_asked_for_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"observe\.wandb .* not installed"):
        MetricsLog(tmp_path, resume_step=0, tensorboard=False, wandb=True)
