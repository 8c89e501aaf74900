"""Mathematics answers: given labels are reproduced, forms of the same answer agree, a worker that hangs is replaced."""

import gzip
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megafuse.rewards.answers import final_answer, last_boxed, same_number
from megafuse.rewards.workers import WARM_UP, Worker, WorkerPool

DATA = Path(__file__).parents[2].parent / "shared" / "data"
MODULE = "megafuse.rewards.math_worker"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"reasoning": "so 3", "answer": "3"}', "3"),
        ('"answer": "4" ... "answer": "-5"', "-5"),
        ('{"answer": 1,234.5}', "1,234.5"),
        (r'{"answer": "\frac{1}{2}"}', r"\frac{1}{2}"),
        (r'{"answer": "\\frac{1}{2}"}', r"\frac{1}{2}"),
        (r"so \boxed{\frac{1}{2}} and \boxed{\{1, 2\}}.", r"\{1, 2\}"),
        ("4 + 4 = 8\n#### 8", "8"),
        ("The answer is 42.", "42"),
        ("I do not know", None),
        (r"\boxed{never closed", None),
    ],
)
def test_where_the_answer_stands(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_plain_numbers() -> None:
    assert same_number("1234", "$1,234.00") is True and same_number("5", "5%") is True
    assert same_number("3", "4") is False and same_number("3", "three") is None and same_number("", "3") is None
    assert last_boxed("no box") is None


def test_the_same_answer_in_other_words() -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    cases = [
        (r"\frac{1}{2}", "0.5", True),
        ("x+1", "1 + x", True),
        ("6\u221a2", r"6\sqrt{2}", True),
        ("{1, 2}", r"\{2, 1\}", True),
        ("8", "Anne is 8 years old.", True),
        ("34", "20 + 6 + 8 = 34", True),
        ("6", "6 * sqrt(2)", False),
        ("2", "2:10 pm", False),
        ("52", "436, 52", False),
        ("25", "25\u221a2", False),
    ]
    with WorkerPool(MODULE, 1, 60.0) as pool:
        found = pool.map([{"gold": gold, "text": rf"\boxed{{{answer}}}"} for gold, answer, _ in cases])
    assert [f and f["correct"] for f in found] == [same for _, _, same in cases]


@pytest.mark.parametrize(("name", "step"), [("gsm8k_fusion", 5), ("math5_fusion", 25)])
def test_given_labels_are_reproduced(name: str, step: int) -> None:
    """At least 99%, on every `step`-th prompt; `megafuse score --compare` does it on all of them."""
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data is not beside the repository")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()[::step]]
    responses = [(row["gold"], r) for row in rows for r in row["responses"]]
    with WorkerPool(MODULE, 2, 30.0) as pool:
        found = pool.map([{"gold": gold, "text": r["text"]} for gold, r in responses])
    wrong = [
        (r["correct"], f, r["text"][-80:])
        for (_, r), f in zip(responses, found)
        if (f or {}).get("correct") != r["correct"]
    ]
    assert len(responses) > 250 and len(wrong) <= 0.01 * len(responses), wrong


def test_a_worker_that_hangs_is_killed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleepy_worker.py").write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    seconds = json.loads(line).get('sleep', 0)\n"
        "    if seconds < 0: os._exit(1)\n"
        "    time.sleep(seconds)\n"
        "    print(json.dumps({'pid': os.getpid()}), flush=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with WorkerPool("sleepy_worker", 1, 1.0) as pool:
        started = time.monotonic()
        first, hung, second, died, third = pool.map([{}, {"sleep": 600}, {}, {"sleep": -1}, {}])
        assert time.monotonic() - started < 60
    assert hung is None and died is None
    assert first and second and third and len({first["pid"], second["pid"], third["pid"]}) == 3
    for answer in (first, second, third):
        assert not Path(f"/proc/{answer['pid']}").exists()


def test_ctrl_c_is_answered_by_the_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker survives the signal, which a terminal sends to all; the pool that is interrupted kills it."""
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    worker = Worker(MODULE)
    assert worker.ask(WARM_UP, 60.0) and worker._process is not None
    worker._process.send_signal(signal.SIGINT)
    assert worker.ask(WARM_UP, 60.0) and worker._process.poll() is None
    worker.close()
    (tmp_path / "stuck_worker.py").write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if 'pid' in request: open(request['pid'], 'w').write(str(os.getpid())); time.sleep(600)\n"
        "    print('{}', flush=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def interrupt() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), WorkerPool("stuck_worker", 1, 60.0) as pool:
        pool.map([{"pid": str(tmp_path / "pid")}, {}])
    assert time.monotonic() - started < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_garbage_has_no_verdict_and_harms_nobody() -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    worker = Worker(MODULE)
    for text in ("\\boxed{" + "(" * 5000 + "}", "\\boxed{9^{9^{9^{9^9}}}}", "\\boxed{\\int\\int}", "\x00\ud7ff"):
        found = worker.ask({"gold": "1", "text": text}, 2.0)
        assert found is None or found["correct"] is not True
    assert worker.ask(WARM_UP, 60.0) == {"correct": True, "answer": "\\frac{2}{4}", "how": "math-verify"}
    worker.close()
