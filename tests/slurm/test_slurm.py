"""The unmodified sbatch scripts on a real Slurm of four nodes, and what clusters do to them."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from megafuse.checkpoint.folder import complete_steps
from megafuse.observe.metrics import read_metrics
from megafuse.testing.server import ChatServer
from megafuse.testing.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200  # a fault takes hold some 20 steps after it was asked for, where nothing else keeps the machine busy
ARGS = ["--global_batch_size", "8", "--epochs", "20", "--max_steps", str(STEPS), "--checkpoint.interval", "10",
        "--observe.no_tensorboard", "--guard.hang_seconds", os.environ.get("SLURM_TEST_HANG", "20")]  # fmt: skip
SOON = 60  # steps: a signal takes seconds to reach the ranks, and a step a tenth of one
PATIENCE = float(os.environ.get("SLURM_TEST_PATIENCE", "600"))
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
        environment = self.environment(run, first, **env)
        run.parent.mkdir(parents=True, exist_ok=True)
        options = ["-N", str(nodes), "--time=60", "-o", f"{run}.out"]
        if script.endswith(".sh"):
            script = str(ROOT / "slurm" / script)
        return self.cluster.submit(script, *args, options=options, env=environment, cwd=ROOT)

    def environment(self, run: Path, first: Path | None = None, **env: str) -> dict[str, str]:
        """One process a node; `first`: a folder whose programs come before all others."""
        path = [str(p) for p in (first, self.programs) if p] + [os.environ["PATH"]]
        return {
            "PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NPROC": "1", "TP": "1",
            "MODEL": str(self.inputs / "hf"), "DATA": str(self.inputs / "scored.jsonl.gz"), "RUN": str(run), **env,
        }  # fmt: skip

    def pipeline(self, run: Path, **env: str) -> dict[str, str]:
        """pipeline.sh: name -> job, in order."""
        run.mkdir()
        line = ["bash", str(ROOT / "slurm" / "pipeline.sh"), "--time=60", "-o", f"{run}/%x-%j.out"]
        given = {**self.cluster.environment, **self.environment(run, **env)}
        done = subprocess.run(line, env=given, capture_output=True, text=True, check=True, timeout=300)
        return dict(line.split() for line in done.stdout.splitlines())


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


@dataclass
class Beside:
    """Jobs that other tests look at, and that need nothing of each other: they run beside the long ones."""

    chain: dict[str, str]
    stopped: dict[str, str]
    restarts: str
    refused: dict[str, str]
    folder: Path
    requests: list[str] = field(default_factory=list)


def answer(body: dict[str, Any]) -> str:
    """The sources' server and the judge in one: what is said depends on the question and the seed alone."""
    question = body["messages"][-1]["content"]
    number = int(hashlib.sha256(f"{question}{body.get('seed')}".encode()).hexdigest(), 16)
    return f"Rating: [[{number % 1000 / 100}]]" if "[Response]" in question else str(number % 10) * 6


REFUSED: dict[str, tuple[int, str]] = {
    "health": (71, r"node\d: 7 of 8 GPUs answer; exclude this node"),
    "filesystem": (72, r"RUN must be on a file system that all nodes see"),
    "model": (2, r"refused: MODEL /nowhere has no config.json: set MODEL"),
    "data": (2, r"refused: DATA /nowhere is not there: set DATA"),
    "layout": (2, r"TP 3 x PP 1 x CP 1 = 3 ranks do not divide the 8 GPUs of 1 nodes; set TP, PP or CP, or sbatch -N"),
    "shape": (2, r"heads = 6 is not divisible by parallel.tensor = 4; .*(?s:.*)set TP, PP, VPP, CP or EP"),
    "gpus": (2, r"NPROC 9, but Slurm gives 8 GPUs a node: set NPROC, or sbatch --gres=gpu:9"),
    "argument": (2, r"optim\.lr(?s:.*)refused: the arguments of megafuse train"),
    "task": (2, r"refused: task none of 1 SOURCES: sbatch --array=0-0"),
}


def refused(cluster: SlurmCluster, submit: Submitter, stand_ins: Path, folder: Path, fault: str) -> str:
    """Submit a job that cannot work."""
    run = folder / fault
    if fault not in ("model", "data"):
        made(run)
    env = {"NPROC": "8", "GPUS": "7" if fault == "health" else "8"}
    env |= {
        "filesystem": {"RUN": str(cluster.lab / "local" / "run")},
        "model": {"MODEL": "/nowhere"},
        "data": {"DATA": "/nowhere"},
        "layout": {"TP": "3"},
        "shape": {"TP": "4"},
        "gpus": {"NPROC": "9"},
        "task": {"SOURCES": "a=http://h/v1", "PROMPTS": "p"},
    }.get(fault, {})
    args = ["--optim.lrr", "1"] if fault == "argument" else []
    script = "sample_sources.sh" if fault == "task" else "fusepo_llama8b.sh"
    nodes = 2 if fault in ("health", "filesystem") else 1
    return submit(script, run, *args, nodes=nodes, first=stand_ins, **env)


@pytest.fixture(scope="module")
def beside(
    cluster: SlurmCluster, submit: Submitter, stand_ins: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Beside]:
    folder = tmp_path_factory.mktemp("beside")
    (cluster.lab / "local").chmod(0o777)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_id": f"p{i}", "prompt": f"Count to {i}"}) + "\n" for i in range(40)))
    short = "--global_batch_size 4 --max_steps 2 --epochs 1 --observe.no_tensorboard"
    requests: list[str] = []

    def noted(body: dict[str, Any]) -> str:
        requests.append(body["model"])
        return answer(body)

    with ChatServer(noted, host=cluster.gateway) as server:
        given = {"PROMPTS": str(prompts), "DATA": "", "REWARD": "judge", "SFT_ARGS": short, "PO_ARGS": short,
                 "SAMPLE_ARGS": "--n 3", "SCORE_ARGS": f"--base_url {server.url}"}  # fmt: skip
        sources = " ".join(f"{name}={server.url}" for name in ("alpha", "beta"))
        yield Beside(
            submit.pipeline(folder / "chain", SOURCES=sources, **given),
            submit.pipeline(folder / "stopped", SOURCES="alpha=/nowhere", **given),
            submit(
                "fusepo_llama8b.sh", made(folder / "again"), first=stand_ins, nodes=1, MAX_RESTARTS="2", HEALTH="off"
            ),
            {fault: refused(cluster, submit, stand_ins, folder, fault) for fault in REFUSED},
            folder,
            requests,
        )


@pytest.fixture(scope="module")
def whole(cluster: SlurmCluster, submit: Submitter, beside: "Beside", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From scored answers to a Hugging Face folder, undisturbed, on two nodes."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    job = submit("fusepo_llama8b.sh", run, *ARGS, COMMENT_SECONDS="1")
    finished(cluster, job, run)
    assert re.fullmatch(rf"step \d+ of {STEPS}", cluster.comment(job)), "the last step that squeue showed"
    submit.times["steps_seconds"] = sum(record["step_seconds"] for record in read_metrics(run / "train"))
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
    cancelled: tuple[str, Path, int] | None = None


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
    pool = ThreadPoolExecutor(1)
    cancelled = pool.submit(cancel, cluster, submit, whole, run.parent / "cancelled")

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
    seen.cancelled = cancelled.result()
    pool.shutdown()
    return seen


def cancel(cluster: SlurmCluster, submit: Submitter, whole: Path, run: Path) -> tuple[str, Path, int]:
    """scancel of a job in training, beside the battered one: job, run folder, the step in which it was."""
    for name in ("dataset", "model", "reference"):
        shutil.copytree(whole / name, run / name)
    job = submit("fusepo_llama8b.sh", run, *ARGS)
    step = wait_step(cluster, run, f"{job}.0", 2)
    cluster.cancel(job)
    finished(cluster, job, run, "CANCELLED")
    return job, run, step


def test_the_battered_job_is_the_same_run(whole: Path, battered: Battered) -> None:
    assert battered.restarts == "4"
    assert numbers(battered.run) == numbers(whole)
    assert (battered.run / "hf" / "config.json").is_file()


def test_before_the_time_limit_it_saves_within_a_step(battered: Battered) -> None:
    told = output(battered.run)
    saved = re.search(r"preempted after step (\d+), saved as", told)
    assert saved and battered.at["usr1"] <= int(saved[1]) <= battered.at["usr1"] + SOON
    assert f"resumed from {battered.run}/train/checkpoints/step_{int(saved[1]):08d}" in told
    assert "exit code 85; requeue, try 1 of 3" in told


def test_a_crashed_rank_ends_the_start_and_the_job_is_requeued(battered: Battered) -> None:
    codes = re.findall(r"exit code (\d+); requeue", output(battered.run))
    assert (codes[0], codes[2]) == ("85", "75") and codes[1] not in ("0", "2", "75", "85")


def test_a_hung_rank_is_named_with_the_stacks_of_the_others(battered: Battered) -> None:
    told = output(battered.run)
    assert re.search(r"no progress for \d+ s in step \d+, phase '\w+': rank \d gives no sign of life", told)
    assert "exit code 75; requeue" in told
    # the frozen rank writes its own too where it is woken to be ended
    stacks = list((battered.run / "train" / "stacks" / f"{battered.job}.2").glob("rank_*.txt"))
    assert stacks and all("Thread" in path.read_text() for path in stacks)


def test_scancel_saves_and_is_final(cluster: SlurmCluster, battered: Battered) -> None:
    """The battered job has had four restarts since: a requeue by the script would long have happened."""
    assert battered.cancelled
    job, run, step = battered.cancelled
    assert cluster.field(job, "JobState") == "CANCELLED" and cluster.field(job, "Restarts") == "0"
    saved = complete_steps(run / "train" / "checkpoints")[-1]
    assert step <= saved <= step + SOON and json.loads((run / "train" / "outcome.json").read_text())["code"] == 143


def made(run: Path) -> Path:
    """A run folder in which every stage before training is finished, as far as the script can see."""
    for name in ("dataset", "model", "reference"):
        (run / name).mkdir(parents=True)
        (run / name / "manifest.json").write_text('{"complete": true}')
    return run


def test_restarts_that_bring_nothing_come_to_an_end(cluster: SlurmCluster, beside: Beside) -> None:
    job, run = beside.restarts, beside.folder / "again"
    finished(cluster, job, run, "FAILED")
    told = output(run)
    assert cluster.field(job, "Restarts") == "2" and cluster.field(job, "ExitCode") in ("9:0", "1:0")
    assert "try 2 of 2" in told and "2 restarts brought nothing new" in told


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_work_is_refused_before_anything_starts(cluster: SlurmCluster, beside: Beside, fault: str) -> None:
    code, message = REFUSED[fault]
    job, run = beside.refused[fault], beside.folder / fault
    finished(cluster, job, run, "FAILED")
    assert re.search(message, output(run)), output(run)
    assert cluster.field(job, "ExitCode") == f"{code}:0" and cluster.field(job, "Restarts") == "0"


def told(folder: Path) -> str:
    return "\n".join(f"{path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.out")))


def test_an_array_samples_one_source_a_task(cluster: SlurmCluster, beside: Beside) -> None:
    run = beside.folder / "chain"
    state = cluster.wait_state(beside.chain["sample"], "COMPLETED|FAILED|CANCELLED", PATIENCE)
    cluster.wait(lambda: cluster.field(beside.chain["score"], "JobState") != "PENDING", PATIENCE, "scoring")
    assert state == "COMPLETED", told(run)
    for name in ("alpha", "beta"):
        with gzip.open(run / "responses" / f"{name}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        assert len(rows) == 40 and {r["source"] for row in rows for r in row["responses"]} == {name}
        assert all(len(row["responses"]) == 3 for row in rows)
    assert {"alpha", "beta"} <= set(beside.requests)
    assert len([path for path in run.glob("megafuse-sample-*.out") if "done: " in path.read_text()]) == 2


def test_the_whole_chain(cluster: SlurmCluster, submit: Submitter, beside: Beside) -> None:
    """pipeline.sh from prompts to a verified Hugging Face folder: each job begins when those before it are done."""
    run = beside.folder / "chain"
    order = ["sample", "score", "convert", "build_sft", "build_po", "fusesft", "reference", "fusepo", "export"]
    assert list(beside.chain) == order
    for name in order:
        state = cluster.wait_state(beside.chain[name], "COMPLETED|FAILED|CANCELLED", 2 * PATIENCE)
        assert state == "COMPLETED", f"{name} {state}\n{told(run)}"
    when = {n: [cluster.field(beside.chain[n], f"{end}Time") for end in ("Start", "End")] for n in order}
    after = [("sample", "score"), ("score", "build_sft"), ("score", "build_po"), ("convert", "fusesft"),
             ("build_sft", "fusesft"), ("fusesft", "reference"), ("build_po", "reference"), ("reference", "fusepo"),
             ("fusepo", "export")]  # fmt: skip
    assert all(when[first][1] <= when[second][0] for first, second in after), when
    assert (run / "fusepo" / "hf" / "config.json").is_file()
    steps = {name: len(read_metrics(run / name / "train")) for name in ("fusesft", "fusepo")}
    assert steps == {"fusesft": 2, "fusepo": 2}
    # done once: training found data, checkpoint and reference of the jobs before it
    trained = "".join(path.read_text() for path in run.glob("fuse*.out"))
    found = set(re.findall(r"(build|import|reference): \S+/(fusesft|fusepo)/\S+ is there", trained))
    stages = [("build", "fusesft"), ("import", "fusesft"), ("build", "fusepo"), ("import", "fusepo")]
    assert found == {*stages, ("reference", "fusepo")}, trained
    assert "verdict: the same model" in told(run)


def test_a_chain_ends_where_a_job_fails(cluster: SlurmCluster, beside: Beside) -> None:
    states = {}
    for name, job in beside.stopped.items():
        states[name] = cluster.wait_state(job, "COMPLETED|FAILED|CANCELLED", PATIENCE)
    assert states.pop("sample") == "FAILED" and states.pop("convert") == "COMPLETED"
    assert set(states.values()) == {"CANCELLED"}
    assert "SOURCES: /nowhere has no config.json" in told(beside.folder / "stopped")
