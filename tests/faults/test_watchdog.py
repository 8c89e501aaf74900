"""A rank that hangs is found, named, and ended, with the stacks of all that can still write; no torch is needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megafuse.training.outcome import OUTCOME
from megafuse.training.watchdog import HEARTBEAT

pytestmark = pytest.mark.faults

RANK = """
import os, sys, time
from pathlib import Path
from megafuse.checkpoint.lock import acquire
from megafuse.training.signals import StopRequest
from megafuse.training.watchdog import Watchdog

def waits_for_its_peer():
    time.sleep(600)

run, rank, hang, stuck_in = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
with StopRequest(run) as stop:
    stop.can_save = True
    watch = Watchdog(run, rank, 2, hang_seconds=hang, total=9, lock=None, stop=stop, environ={"SLURM_JOB_ID": "5"})
    with watch:
        watch.beat(1, "data")
        watch.beat(2, "data")
        if stuck_in != "data":
            watch.beat(2, "update")
        print("ready", flush=True)
        waits_for_its_peer()
"""


def start(run: Path, rank: int, hang: float, stuck_in: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RANK, str(run), str(rank), str(hang), stuck_in]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("fault", ["stuck", "stopped"])
def test_the_rank_that_did_not_arrive_is_named(tmp_path: Path, fault: str) -> None:
    late = start(tmp_path, 1, 600 if fault == "stopped" else 2, "data")
    if fault == "stopped":
        os.kill(late.pid, signal.SIGSTOP)
    waiting = start(tmp_path, 0, 2, "update")
    try:
        error = waiting.communicate(timeout=120)[1]
    finally:
        for process in (late, waiting):
            if fault == "stopped" or process is waiting:
                process.kill()
        late_code = late.wait(120)
    assert waiting.returncode == 75
    reason = {"stuck": "rank 1 is still in step 2, phase 'data'", "stopped": "rank 1 gives no sign of life"}[fault]
    assert f"in step 2, phase 'update': {reason}. Stacks of all threads: {tmp_path / 'stacks' / '5.0'}" in error
    head, _, stacks = (tmp_path / "stacks" / "5.0" / "rank_00000.txt").read_text().partition("\n")
    assert json.loads(head)["step"] == 2 and "waits_for_its_peer" in stacks and "_watch" in stacks
    assert json.loads((tmp_path / OUTCOME).read_text())["code"] == 75
    assert json.loads((tmp_path / HEARTBEAT).read_text())["step"] == 2
    if fault == "stuck":
        assert late_code == 75 and (tmp_path / "stacks" / "5.0" / "rank_00001.txt").exists()


def test_a_run_that_goes_on_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 600, "update")
    process.send_signal(signal.SIGUSR1)  # remembered: the run can save
    time.sleep(0.5)
    assert process.poll() is None
    time.sleep(3.0)  # a TERM right behind would be the other half of a pair
    process.terminate()
    assert process.wait(60) == 143
