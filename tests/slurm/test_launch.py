"""`megafuse launch` on a real Slurm: through NeMo-Run, from its own environment, and without it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megafuse.observe.metrics import read_metrics
from megafuse.testing.launch_stand_ins import write_stand_ins
from megafuse.testing.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
NEMO = os.environ.get("MEGAFUSE_NEMO_PYTHON") or (sys.executable if find_spec("nemo_run") else "")
needs_nemo = pytest.mark.skipif(
    not NEMO, reason="no NeMo-Run: pip install -e '.[launch]', or set MEGAFUSE_NEMO_PYTHON (scripts/ci_launch.sh)"
)
THROUGH = [pytest.param("nemo-run", marks=needs_nemo), "plain"]


def launch(
    cluster: SlurmCluster, via: str, home: Path, programs: Path, *words: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """`megafuse launch WORDS`, followed to its end."""
    line = [NEMO if via == "nemo-run" else sys.executable, "-m", "megafuse", "launch", *words, "--via", via, "--follow"]
    environment = {
        **cluster.environment, "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]), "PYTHONPATH": str(ROOT),
        "NEMORUN_HOME": str(home / "nemo"), "OMP_NUM_THREADS": "1", "NPROC": "1", "TP": "1", **env,
    }  # fmt: skip
    return subprocess.run(line, env=environment, cwd=home, capture_output=True, text=True, timeout=800)


@needs_nemo
def test_nemo_run_submits_the_recipe_and_says_succeeded(
    cluster: SlurmCluster, programs: Path, inputs: Path, tmp_path: Path
) -> None:
    """Scored answers to a Hugging Face folder, on two nodes, by the unmodified script."""
    run = tmp_path / "run"
    done = launch(
        cluster, "nemo-run", tmp_path, programs, "fusepo_llama8b", "--nodes", "2", "--time", "60",
        "--model", str(inputs / "hf"), "--data", str(inputs / "scored.jsonl.gz"), "--run", str(run),
        "--set", "global_batch_size=8", "max_steps=4", "observe.no_tensorboard",
    )  # fmt: skip
    (log,) = run.glob("fusepo-llama8b-*.out")
    told = log.read_text()
    assert done.returncode == 0 and "fusepo-llama8b: SUCCEEDED, job " in done.stdout, done.stdout + done.stderr + told
    assert "world 2 on cpu" in told and len(read_metrics(run / "train")) == 4
    assert (run / "hf" / "config.json").is_file()


@pytest.mark.parametrize("via", THROUGH)
def test_a_job_that_refuses_is_not_said_to_have_succeeded(
    cluster: SlurmCluster, programs: Path, tmp_path: Path, via: str
) -> None:
    run = tmp_path / "run"
    done = launch(cluster, via, tmp_path, programs, "fusepo_llama8b", "--model", "/nowhere", "--data", "x",
                  "--run", str(run))  # fmt: skip
    assert done.returncode == 1 and "fusepo-llama8b: FAILED, job " in done.stdout, done.stdout + done.stderr
    (log,) = run.glob("fusepo-llama8b-*.out")
    assert "refused: DATA x is not there" in log.read_text()
    job = log.stem.rpartition("-")[2]
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0"


SWEEP = """
recipe = "fusepo_llama8b"
run = "{folder}/sweep"
model = "{inputs}/hf"
data = ["{inputs}/scored.jsonl.gz"]
holdout = 0.1
env = ["HEALTH=off"]
[grid]
k = [1, 2]
"""


@pytest.mark.parametrize("via", THROUGH)
def test_a_sweep_is_jobs_and_a_table(cluster: SlurmCluster, inputs: Path, tmp_path: Path, via: str) -> None:
    """Stand-ins train; Slurm, the scripts and the launcher are real."""
    (tmp_path / "sweep.toml").write_text(SWEEP.format(folder=tmp_path, inputs=inputs))
    programs = write_stand_ins(tmp_path / "bin")
    done = launch(cluster, via, tmp_path, programs, "sweep", "sweep.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert [(row["point"], row["status"], row["intra"]) for row in rows] == [
        ("k-1", "done", 0.75),
        ("k-2", "done", 0.75),
    ]
    jobs = [json.loads((tmp_path / "sweep" / name / "launch.json").read_text()) for name in ("k-1", "k-2")]
    assert [job["state"] for job in jobs] == ["SUCCEEDED"] * 2 and jobs[0]["job"] != jobs[1]["job"]
    assert all(cluster.field(job["job"], "JobState") == "COMPLETED" for job in jobs)
    again = launch(cluster, via, tmp_path, programs, "sweep", "sweep.toml")
    assert "2 points, 0 to start" in again.stdout, again.stdout + again.stderr
