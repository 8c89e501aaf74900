"""The sbatch scripts, run unmodified, with stand-ins for Slurm, torchrun and megafuse that record command lines."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megafuse.cli.bench import CONFIG as BENCH_CONFIG
from megafuse.cli.build import CONFIG as BUILD_CONFIG
from megafuse.cli.reference import CONFIG as REFERENCE_CONFIG
from megafuse.cli.train import CONFIG as TRAIN_CONFIG
from megafuse.config.load import parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))

# `srun` starts node.sh once a node; `torchrun` makes what a training or reference run would leave behind
STUBS = {
    "srun": """
        echo "srun $*" >> "$LOG"
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node SLURM_PROCID=$node "$@"; done""",
    "scontrol": """
        case "$*" in
          "show hostnames node[7-8]") echo node7; echo node8 ;;
          "-o show job 123456") echo "JobId=123456 JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
          "requeue 123456") echo "requeue" >> "$LOG"; kill -KILL "$PPID" ;;
          "-o show node node7") echo "NodeName=node7 Arch=x NodeAddr=10.1.2.3 NodeHostName=node7" ;;
          *) echo "unexpected: scontrol $*" >&2; exit 9 ;;
        esac""",
    "getent": 'exit "${GETENT_STATUS:-2}"',
    "nvidia-smi": """
        case "$1" in
          -L) for ((i = 0; i < ${FAKE_GPUS:-8}; i++)); do echo "GPU $i: fake"; done ;;
          --query-gpu=*) echo "${FAKE_ERRORS:-0}" ;;
          --query-compute-apps=*) echo "${FAKE_APPS:-}" ;;
        esac""",
    "torchrun": """
        echo "torchrun $*" >> "$LOG"
        echo "env SAFE=$PYTHONSAFEPATH EXPORT=${SLURM_EXPORT_ENV:-unset} OMP=$OMP_NUM_THREADS" >> "$LOG"
        [ -z "${FAIL:-}" ] || exit "$FAIL"
        case " $* " in
          *" megafuse reference "*)
            mkdir -p "$RUN/reference"
            echo '{"complete": true}' > "$RUN/reference/manifest.json" ;;
          *) mkdir -p "$RUN"/train/checkpoints/step_{00000100,00000200,00000300.tmp} ;;
        esac""",
    "megafuse": """
        case " $* " in *" --print_config "*) echo "$*" >> "$LOG.config"; exit "${BAD_CONFIG:-0}" ;; esac
        echo "megafuse $*" >> "$LOG"
        out=${!#}
        case "$1 $2" in
          "build "*) mkdir -p "$RUN/dataset"; touch "$RUN/dataset/manifest.json" ;;
          "convert import") mkdir -p "$out"; touch "$out/manifest.json" ;;
          "convert export") mkdir -p "$out"; touch "$out/config.json" ;;
        esac""",
}


class Cluster:
    """A folder of stand-ins, and the environment of a job on two nodes of eight GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        for name, body in STUBS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\nset -eu\n{body}\n")
            path.chmod(0o755)
        (folder / "data").mkdir()
        (folder / "hf model").mkdir()
        (folder / "hf model" / "config.json").touch()
        for name in ("a.jsonl.gz", "b.jsonl.gz"):
            (folder / "data" / name).touch()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMP", "CUDA"))}
        self.env = {
            **kept,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(self.log),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_EXPORT_ENV": "NONE",
            "MODEL": str(folder / "hf model"),
            "DATA": f"{folder}/data/*.jsonl.gz",
            "RUN": str(folder / "run"),
        }

    def submit(self, script: str, *args: str, **env: str) -> tuple[int, list[str], str]:
        """Exit status, recorded lines, output; as Slurm does it, from a copy of the script somewhere else."""
        spool = self.folder / "spool_script"
        shutil.copy(ROOT / "slurm" / script, spool)
        self.log.write_text("")
        (self.folder / "log.config").write_text("")
        done = subprocess.run(
            ["bash", str(spool), *args],
            env={**self.env, **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        lines = [line for line in self.log.read_text().splitlines() if not line.endswith("node.sh check")]
        return done.returncode, lines, done.stdout + done.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def words(line: str, after: str) -> list[str]:
    """The words behind `after`. The one argument with a space in it is made whole again."""
    return [w.replace("\0", " ") for w in line.replace("hf model", "hf\0model").partition(after)[2].split()]


def test_fusesft(cluster: Cluster) -> None:
    status, lines, output = cluster.submit("fusesft_llama8b.sh", "--optim.lr", "7e-6")
    assert status == 0, output
    run = cluster.folder / "run"
    build = parse(BUILD_CONFIG, words(lines[0], "megafuse build"), prog="", description="")
    assert build.inputs == (cluster.folder / "data/a.jsonl.gz", cluster.folder / "data/b.jsonl.gz")
    assert (build.kind, build.resolved_alpha, build.max_length, build.resolved_k) == ("sft", 1e-2, 2048, 4)
    assert build.tokenizer == cluster.folder / "hf model" and build.output == run / "dataset"
    assert words(lines[1], "megafuse convert import") == [str(cluster.folder / "hf model"), str(run / "model")]
    assert lines[2].startswith("srun --nodes=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 ")
    starts = [line for line in lines if line.startswith("torchrun ")]
    assert len(starts) == 2 and starts[0] == starts[1]  # one a node, the same on both
    assert starts[0].startswith(
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=10.1.2.3:"
    )
    assert "--rdzv-id=123456.0.1 -m megafuse train " in starts[0]
    assert "env SAFE=1 EXPORT=unset OMP=8" in lines
    train = parse(TRAIN_CONFIG, words(starts[0], "megafuse train"), prog="", description="")
    assert (train.optim.lr, train.epochs, train.global_batch_size, train.loss.name) == (7e-6, 3, 128, "sft")
    assert train.run_dir == run / "train" and train.model.path == run / "model" and train.data.dataset == build.output
    assert (train.parallel.tensor, train.parallel.pipeline, train.parallel.sequence) == (2, 1, True)
    # the newest finished checkpoint, not the .tmp beside it
    assert lines[-1] == f"megafuse convert export {run}/train/checkpoints/step_00000200 {run}/hf"
    assert "done: " in output


def test_fusepo(cluster: Cluster) -> None:
    settings = {"TP": "1", "PP": "2", "BUILD": "--min_gap 0.01 --max_gap 0.1", "NPROC": "3", "GETENT_STATUS": "0"}
    status, lines, output = cluster.submit("fusepo_llama8b.sh", "--optim.lr", "8e-7", **settings)
    assert status == 0, output
    run = cluster.folder / "run"
    build = parse(BUILD_CONFIG, words(lines[0], "megafuse build"), prog="", description="")
    assert (build.kind, build.resolved_alpha, build.max_length) == ("pair", 5e-3, 2048)
    assert (build.min_gap, build.max_gap) == (0.01, 0.1)
    starts = [line for line in lines if line.startswith("torchrun ")][::2]
    assert len(starts) == 2 and all("--nproc-per-node=3 " in s and "--rdzv-endpoint=node7:" in s for s in starts)
    reference = parse(REFERENCE_CONFIG, words(starts[0], "megafuse reference"), prog="", description="")
    train = parse(TRAIN_CONFIG, words(starts[1], "megafuse train"), prog="", description="")
    assert reference.out == run / "reference" == train.reference.path
    # what the cache's key depends on has to be the same on both sides
    assert (reference.model.path, reference.model.precision) == (train.model.path, train.model.precision)
    assert reference.data == train.data and reference.parallel == train.parallel
    assert (train.loss.name, train.loss.beta, train.optim.lr, train.epochs) == ("ln_dpo", 10.0, 8e-7, 1)
    assert (train.parallel.tensor, train.parallel.pipeline, train.parallel.sequence) == (1, 2, False)
    ports = [int(re.search(r"--rdzv-endpoint=\w+:(\d+)", s)[1]) for s in starts]  # type: ignore[index]
    assert ports[0] != ports[1] and all(20000 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        ("llama8b", (5e-6, 8e-7, "ln_dpo", 10.0)),
        ("qwen7b", (2e-6, 3e-7, "dpo", 0.01)),
        ("gemma9b", (2e-6, 5e-7, "dpo", 0.01)),
        ("llama3b", (5e-6, 1e-6, "ln_dpo", 10.0)),
        ("llama1b", (5e-6, 1e-6, "ln_dpo", 10.0)),
    ],
)
def test_fusechat3(cluster: Cluster, target: str, numbers: tuple[float, float, str, float]) -> None:
    status, lines, output = cluster.submit(f"fusechat3_{target}.sh")
    assert status == 0, output
    run = cluster.folder / "run"
    builds = [words(line, "megafuse build") for line in lines if line.startswith("megafuse build")]
    sft, pairs = (parse(BUILD_CONFIG, line, prog="", description="") for line in builds)
    assert (sft.kind, sft.selection, sft.output) == ("sft", "single_best", run / "sft" / "dataset")
    assert (pairs.kind, pairs.min_gap, pairs.max_gap, pairs.tokenizer) == ("pair", 0.01, 0.1, run / "sft" / "hf")
    starts = [line for line in lines if line.startswith("torchrun ")][::2]
    first, second = (parse(TRAIN_CONFIG, words(starts[i], "megafuse train"), prog="", description="") for i in (0, 2))
    assert (first.optim.lr, second.optim.lr, second.loss.name, second.loss.beta) == numbers
    assert (first.loss.name, first.epochs, second.epochs) == ("sft", 3, 1)
    assert second.model.path == run / "po" / "model" and lines[-1].endswith(f" {run}/po/hf")


def test_bench(cluster: Cluster) -> None:
    data = str(cluster.folder / "data" / "a.jsonl.gz")
    status, lines, output = cluster.submit(
        "bench.sh", "--sources", "2", "8", DATA=data, MODEL="llama-3.2-1b", TP="4", TRACE="/traces"
    )
    assert status == 0, output
    starts = [line for line in lines if line.startswith("torchrun ")]
    assert len(starts) == 2 and "--nnodes=2 --nproc-per-node=8 " in starts[0]
    config = parse(BENCH_CONFIG, words(starts[0], "megafuse bench"), prog="", description="")
    assert (str(config.model.path), str(config.data.path), config.sources) == ("llama-3.2-1b", data, (2, 8))
    assert config.out == cluster.folder / "run" / "bench-123456.json" and str(config.observe.trace) == "/traces"
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence) == (4, 1, True)


@pytest.mark.parametrize("script", ["fusesft_llama8b.sh", "fusepo_llama8b.sh"])
def test_submitted_again_it_does_only_what_is_missing(cluster: Cluster, script: str) -> None:
    assert cluster.submit(script)[0] == 0
    status, lines, output = cluster.submit(script)
    assert (status, lines) == (0, []), output
    shutil.rmtree(cluster.folder / "run" / "hf")
    status, lines, output = cluster.submit(script, SLURM_RESTART_COUNT="2")
    assert status == 0, output
    assert [line.split()[0] for line in lines] == ["srun", "torchrun", "env", "torchrun", "env", "megafuse"]
    assert "megafuse train" in lines[1] and "--rdzv-id=123456.2.1 " in lines[1]


def test_the_exit_status_of_the_step_is_that_of_the_job(cluster: Cluster) -> None:
    status, lines, _ = cluster.submit("fusesft_llama8b.sh", FAIL="86")
    assert status == 86 and "requeue" not in lines
    assert not any("export" in line for line in lines)


@pytest.mark.parametrize(("code", "state"), [("85", "RUNNING"), ("1", "RUNNING"), ("143", "CANCELLED")])
def test_a_stopped_or_crashed_step_is_requeued_and_a_cancelled_job_never(
    cluster: Cluster, code: str, state: str
) -> None:
    for tries in (1, 2, 3, 4):
        status, lines, output = cluster.submit("fusesft_llama8b.sh", FAIL=code, JOB_STATE=state)
        again = state == "RUNNING" and tries < 4
        assert ("requeue" in lines) == again, output
        assert (f"requeue, try {tries} of 3 from" in output) == again
    assert status == int(code) and ("3 restarts brought no new checkpoint" in output) == (state == "RUNNING")


def test_without_a_checkpoint_nothing_is_exported(cluster: Cluster) -> None:
    (cluster.folder / "bin" / "torchrun").write_text("#!/bin/sh\n")
    status, lines, output = cluster.submit("fusesft_llama8b.sh")
    assert status != 0 and "no checkpoint in " in output
    assert not any("export" in line for line in lines)


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ({"MODEL": ""}, 1, "set MODEL to the Hugging Face folder"),
        ({"MODEL": "/nowhere"}, 2, "refused: MODEL /nowhere has no config.json"),
        ({"DATA": ""}, 1, "set DATA to the scored answers"),
        ({"DATA": "/nowhere/*.jsonl"}, 2, "refused: DATA /nowhere/*.jsonl is not there"),
        ({"SLURM_SUBMIT_DIR": ""}, 1, "submit this file with sbatch"),
        ({"TP": "3"}, 2, "TP 3 x PP 1 x CP 1 = 3 ranks do not divide the 16 GPUs of 2 nodes; set TP, PP or CP"),
        ({"BAD_CONFIG": "2"}, 2, "refused: the arguments of megafuse train"),
        ({"FAKE_GPUS": "7"}, 71, "7 of 8 GPUs answer"),
        ({"FAKE_ERRORS": "4"}, 71, "1 GPUs have uncorrected memory errors"),
        ({"FAKE_APPS": "4711"}, 71, "1 processes are on these GPUs already"),
    ],
)
def test_what_is_wrong_is_said_before_anything_begins(
    cluster: Cluster, env: dict[str, str], code: int, message: str
) -> None:
    status, lines, output = cluster.submit("fusesft_llama8b.sh", **env)
    assert (status, lines) == (code, []) and message in output
    if "FAKE_GPUS" in env or "FAKE_APPS" in env:
        assert cluster.submit("fusesft_llama8b.sh", **{**env, "HEALTH": "off"})[0] == 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_and_name_no_site(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert not re.search(r"#SBATCH\s+(--account|--partition|-A\b|-p\b|--qos|--mail)", text)
    if "#SBATCH" in text:
        assert "set -euo pipefail" in text and path.stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(path)], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["fusesft_llama8b", "fusepo_llama8b"])
def test_presets_hold_the_papers_numbers(name: str) -> None:
    preset = str(ROOT / "megafuse" / "config" / "presets" / f"{name}.toml")
    config = parse(
        TRAIN_CONFIG,
        [preset, "--run_dir", "r", "--model.path", "m", "--data.dataset", "d"],
        prog="",
        description="",
    )
    assert (config.global_batch_size, config.optim.schedule, config.optim.warmup_ratio) == (128, "cosine", 0.1)
    if name.startswith("fusesft"):
        assert (config.optim.lr, config.epochs, config.loss.name) == (1e-5, 3, "sft")
    else:
        assert config.optim.lr in (3e-7, 5e-7, 6e-7, 8e-7, 1e-6)
        assert (config.loss.name, config.loss.beta) == ("ln_dpo", 10.0)
