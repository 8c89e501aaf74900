"""The unmodified sbatch scripts on a real Slurm of four nodes, and what clusters do to them."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from megafuse.checkpoint.folder import complete_steps
from megafuse.observe.metrics import read_metrics
from megafuse.testing.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
ARGS = ["--global_batch_size", "8", "--epochs", "9", "--max_steps", str(STEPS), "--checkpoint.interval", "10",
        "--observe.no_tensorboard", "--guard.hang_seconds", os.environ.get("SLURM_TEST_HANG", "12")]  # fmt: skip
PATIENCE = float(os.environ.get("SLURM_TEST_PATIENCE", "240"))
REPORT = os.environ.get("SLURM_TEST_REPORT")  # a file for measured times


@dataclass
class Submitter:
    cluster: SlurmCluster
    programs: Path
    inputs: Path
    times: dict[str, float] = field(default_factory=dict)

    def __call__(
        self, script: str, run: Path, *args: str, nodes: int = 2, first: Path | None = None, **env: str
    ) -> str:
        path = [str(p) for p in (first, self.programs) if p] + [os.environ["PATH"]]
        environment = {
            "PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NPROC": "1", "TP": "1",
            "MODEL": str(self.inputs / "hf"), "DATA": str(self.inputs / "scored.jsonl.gz"), "RUN": str(run), **env,
        }  # fmt: skip
        run.parent.mkdir(parents=True, exist_ok=True)
        options = ["-N", str(nodes), "--time=60", "-o", f"{run}.out"]
        if script.endswith(".sh"):
            script = str(ROOT / "slurm" / script)
        return self.cluster.submit(script, *args, options=options, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def submit(cluster: SlurmCluster, programs: Path, inputs: Path) -> Iterator[Submitter]:
    submitter = Submitter(cluster, programs, inputs)
    yield submitter
    if REPORT:
        Path(REPORT).write_text(json.dumps(submitter.times, indent=2) + "\n")


def output(run: Path) -> str:
    path = Path(f"{run}.out")
    return path.read_text() if path.exists() else ""


def heart(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "train" / "heartbeat.json").read_text()))
    except (OSError, ValueError):
        return {"job": "", "step": 0}


def wait_step(cluster: SlurmCluster, run: Path, start: str, step: int) -> int:
    """Wait until start `JOB.RESTART` is in or after `step`; its step then."""

    def there() -> bool:
        assert "refused" not in output(run), output(run)
        return heart(run)["job"] == start and heart(run)["step"] >= step

    try:
        cluster.wait(there, PATIENCE, f"step {step} of {start}")
    except TimeoutError as error:
        raise AssertionError(f"{error}; {heart(run)}\n{output(run)[-4000:]}") from None
    return int(heart(run)["step"])


def rank_of(cluster: SlurmCluster, node: str) -> psutil.Process:
    """The training process on a node."""
    for pid in cluster.processes(node):
        process = psutil.Process(pid)
        if "RANK" in process.environ() and process.cmdline()[1:5] == ["-u", "-m", "megafuse", "train"]:
            return process
    raise AssertionError(f"no rank on {node}")


def finished(cluster: SlurmCluster, job: str, run: Path, state: str = "COMPLETED") -> None:
    ends = "COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL"
    try:
        found = cluster.wait_state(job, ends, 2 * PATIENCE)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{output(run)[-4000:]}") from None
    assert found == state, output(run)[-4000:]


def numbers(run: Path) -> list[tuple[str, ...]]:
    clock = ("step_seconds", "tokens_per_second", "mfu")
    return [tuple(f"{k}={v!r}" for k, v in record.items() if k not in clock) for record in read_metrics(run / "train")]


@pytest.fixture(scope="module")
def whole(cluster: SlurmCluster, submit: Submitter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From scored answers to a Hugging Face folder, undisturbed, on two nodes."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    job = submit("fusepo_llama8b.sh", run, *ARGS, COMMENT_SECONDS="1")
    finished(cluster, job, run)
    submit.times["steps_seconds"] = sum(record["step_seconds"] for record in read_metrics(run / "train"))
    assert re.fullmatch(rf"step|step\S*|step {STEPS} of {STEPS}", cluster.field(job, "Comment") or "step")
    return run


def test_from_scored_answers_to_a_model(whole: Path) -> None:
    assert (whole / "hf" / "config.json").is_file() and len(read_metrics(whole / "train")) == STEPS
    assert "world 2 on cpu" in output(whole) and "done: " in output(whole)


@dataclass
class Battered:
    """What happened to one job, start by start."""

    run: Path
    job: str
    at: dict[str, int] = field(default_factory=dict)  # fault -> step at which it was injected
    restarts: str = ""


@pytest.fixture(scope="module")
def battered(
    cluster: SlurmCluster, submit: Submitter, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> Battered:
    """One job that is told of its time limit, loses a rank, has one that hangs, and loses a node."""
    run = tmp_path_factory.mktemp("runs") / "battered"
    for name in ("dataset", "model", "reference"):
        shutil.copytree(whole / name, run / name)
    job = submit("fusepo_llama8b.sh", run, *ARGS)
    seen = Battered(run, job)

    def usr1() -> None:
        cluster.signal_batch(job, "USR1")

    def crash() -> None:
        rank_of(cluster, cluster.nodes_of(job)[1]).kill()

    def hang() -> None:
        rank_of(cluster, cluster.nodes_of(job)[1]).send_signal(signal.SIGSTOP)

    killed: list[str] = []

    def node() -> None:
        killed.append(cluster.nodes_of(job)[1])
        cluster.kill_node(killed[0])

    step = 2
    for start, fault in enumerate((usr1, crash, hang, node)):
        seen.at[fault.__name__] = wait_step(cluster, run, f"{job}.{start}", step)
        fault()
        begun = time.monotonic()
        cluster.wait(lambda: cluster.field(job, "JobState") != "RUNNING", PATIENCE, f"{fault.__name__} detected")
        submit.times[f"{fault.__name__}_detected"] = time.monotonic() - begun
        first = f"{job}.{start + 1}"
        wait_step(cluster, run, first, 1)
        submit.times[f"{fault.__name__}_training_again"] = time.monotonic() - begun
        step = heart(run)["step"] + 2
    finished(cluster, job, run)
    cluster.start_node(killed[0])
    seen.restarts = cluster.field(job, "Restarts")
    return seen


def test_the_battered_job_is_the_same_run(whole: Path, battered: Battered) -> None:
    assert battered.restarts == "4"
    assert numbers(battered.run) == numbers(whole)
    assert (battered.run / "hf" / "config.json").is_file()


def test_before_the_time_limit_it_saves_within_a_step(battered: Battered) -> None:
    told = output(battered.run)
    saved = re.search(r"preempted after step (\d+), saved as", told)
    assert saved and battered.at["usr1"] <= int(saved[1]) <= battered.at["usr1"] + 8
    assert f"resumed from {battered.run}/train/checkpoints/step_{int(saved[1]):08d}" in told
    assert "exit code 85; requeue, try 1 of 3" in told


def test_a_crashed_rank_ends_the_start_and_the_job_is_requeued(battered: Battered) -> None:
    codes = re.findall(r"exit code (\d+); requeue", output(battered.run))
    assert (codes[0], codes[2]) == ("85", "75") and codes[1] not in ("0", "2", "75", "85")


def test_a_hung_rank_is_named_with_the_stacks_of_the_others(battered: Battered) -> None:
    told = output(battered.run)
    assert re.search(r"no progress for \d+ s in step \d+, phase '\w+': rank \d gives no sign of life", told)
    assert "exit code 75; requeue" in told
    (stacks,) = (battered.run / "train" / "stacks" / f"{battered.job}.2").glob("rank_*.txt")
    assert "Thread" in stacks.read_text()


def test_scancel_saves_and_is_final(cluster: SlurmCluster, submit: Submitter, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("dataset", "model", "reference"):
        shutil.copytree(whole / name, run / name)
    job = submit("fusepo_llama8b.sh", run, *ARGS)
    step = wait_step(cluster, run, f"{job}.0", 2)
    cluster.cancel(job)
    finished(cluster, job, run, "CANCELLED")
    time.sleep(5)  # a requeue from the script would follow within seconds
    assert cluster.field(job, "JobState") == "CANCELLED" and cluster.field(job, "Restarts") == "0"
    (saved,) = complete_steps(run / "train" / "checkpoints")
    assert step <= saved <= step + 8 and json.loads((run / "train" / "outcome.json").read_text())["code"] == 143


def made(run: Path) -> Path:
    """A run folder in which every stage before training is finished, as far as the script can see."""
    for name in ("dataset", "model", "reference"):
        (run / name).mkdir(parents=True)
        (run / name / "manifest.json").write_text('{"complete": true}')
    return run


def test_restarts_that_bring_nothing_come_to_an_end(
    cluster: SlurmCluster, submit: Submitter, stand_ins: Path, tmp_path: Path
) -> None:
    run = made(tmp_path / "run")
    job = submit("fusepo_llama8b.sh", run, first=stand_ins, MAX_RESTARTS="2", HEALTH="off")
    finished(cluster, job, run, "FAILED")
    told = output(run)
    assert cluster.field(job, "Restarts") == "2" and cluster.field(job, "ExitCode") in ("9:0", "1:0")
    assert "try 2 of 2" in told and "2 restarts brought no new checkpoint" in told


@pytest.mark.parametrize("fault", ["health", "filesystem", "model", "layout", "argument"])
def test_what_cannot_work_is_refused_before_anything_starts(
    cluster: SlurmCluster, submit: Submitter, stand_ins: Path, tmp_path: Path, fault: str
) -> None:
    run = made(tmp_path / "run")
    env: dict[str, str] = {"GPUS": "8"}
    args: list[str] = []
    code, message = {
        "health": (71, r"node\d: 7 of 8 GPUs answer; exclude this node"),
        "filesystem": (72, r"RUN must be on a file system that all nodes see"),
        "model": (2, r"refused: MODEL /nowhere has no config.json"),
        "layout": (2, r"TP 3 x PP 1 x CP 1 = 3 ranks do not divide the 16 GPUs of 2 nodes"),
        "argument": (2, r"optim\.lr"),
    }[fault]
    if fault == "health":
        env["GPUS"] = "7"
    if fault == "filesystem":
        (cluster.lab / "local").chmod(0o777)
        env["RUN"] = str(cluster.lab / "local" / "run")
    if fault == "model":
        shutil.rmtree(run / "model")
        env["MODEL"] = "/nowhere"
    if fault == "layout":
        env["TP"] = "3"
    if fault == "argument":
        args = ["--optim.lrr", "1"]
    job = submit("fusepo_llama8b.sh", run, *args, first=stand_ins, **{"NPROC": "8", **env})
    finished(cluster, job, run, "FAILED")
    assert re.search(message, output(run)), output(run)
    assert cluster.field(job, "ExitCode") == f"{code}:0" and cluster.field(job, "Restarts") == "0"


def test_an_array_of_sources(cluster: SlurmCluster, submit: Submitter, tmp_path: Path) -> None:
    """One source a task, at most two at once. The command of a task stands for sampling."""
    script = tmp_path / "sources"
    script.write_text(
        f'#!/bin/sh\necho "$SLURM_ARRAY_TASK_ID on $CUDA_VISIBLE_DEVICES" > {tmp_path}/$SLURM_ARRAY_TASK_ID\n'
    )
    env = {"PATH": os.environ["PATH"]}
    options = ["--array=0-3%2", "--gres=gpu:1", "-o", f"{tmp_path}/out"]
    cluster.submit(script, options=options, env=env, cwd=tmp_path)
    cluster.wait(lambda: all((tmp_path / str(i)).exists() for i in range(4)), PATIENCE, "four tasks")
    assert all(re.fullmatch(rf"{i} on [0-7]\n", (tmp_path / str(i)).read_text()) for i in range(4))


STAND_IN = """#!/bin/sh
# stands for a training script: leaves the folder that the next one begins with
test -f "$MODEL/config.json" || exit 2
mkdir -p "$RUN/hf"; echo "$MODEL $BUILD" > "$RUN/hf/config.json"
exit "${FAIL:-0}"
"""


@pytest.mark.parametrize("fail", ["0", "1"])
def test_the_chain(cluster: SlurmCluster, submit: Submitter, inputs: Path, tmp_path: Path, fail: str) -> None:
    """pipeline.sh: the second job begins after the first has succeeded, with its model; never after a failure."""
    import subprocess

    stand_in = tmp_path / "train.sh"
    stand_in.write_text(STAND_IN)
    env = {**cluster.environment, "MODEL": str(inputs / "hf"), "DATA": "x", "RUN": str(tmp_path / "run"), "FAIL": fail,
           "SFT": str(stand_in), "PO": str(stand_in), "SFT_BUILD": "a", "PO_BUILD": "b"}  # fmt: skip
    line = ["bash", str(ROOT / "slurm" / "pipeline.sh"), "-o", str(tmp_path / "out")]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True, timeout=60)
    first, second = done.stdout.split()
    finished(cluster, first, tmp_path / "run", "COMPLETED" if fail == "0" else "FAILED")
    finished(cluster, second, tmp_path / "run", "COMPLETED" if fail == "0" else "CANCELLED")
    result = tmp_path / "run" / "fusepo" / "hf" / "config.json"
    if fail == "0":
        assert result.read_text() == f"{tmp_path}/run/fusesft/hf b\n"
    else:
        assert not result.exists()
