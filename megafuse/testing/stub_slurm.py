"""Stand-ins for Slurm, torchrun and megafuse that record command lines, to run the sbatch scripts unmodified."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

# `srun` starts node.sh once a node; `torchrun` makes what a training or reference run would leave behind
STUBS: Mapping[str, str] = {
    "srun": """
        echo "srun $*" >> "$LOG"
        nodes=$SLURM_JOB_NUM_NODES
        while [[ $1 == --* ]]; do [[ $1 != --nodes=* ]] || nodes=${1#*=}; shift; done
        for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node SLURM_PROCID=$node "$@"; done""",
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
        case "$*" in "doctor layout "*) echo "$*" >> "$LOG.config"; exit "${BAD_LAYOUT:-0}" ;; esac
        echo "megafuse $*" >> "$LOG"
        case "$1 $2" in
          "build "*) mkdir -p "$RUN/dataset"; touch "$RUN/dataset/manifest.json" ;;
          "convert import") mkdir -p "$4"; touch "$4/manifest.json" ;;
          "convert export") mkdir -p "$4"; touch "$4/config.json" ;;
        esac""",
    "sbatch": """
        echo "RUN=${RUN:-} MODEL=${MODEL:-} DATA=${DATA:-} BUILD=${BUILD:-} sbatch $*" >> "$LOG"
        echo $((100 + $(grep -c sbatch "$LOG")))""",
}


class StubCluster:
    """A folder of stand-ins, and the environment of a job on two nodes of eight GPUs.

    Args:
        folder: an empty one.
        root: the repository.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root, self.log = folder, root, folder / "log"
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
            "SLURM_SUBMIT_DIR": str(root),
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
        shutil.copy(self.root / "slurm" / script, spool)
        self.log.write_text("")
        (self.folder / "log.config").write_text("")
        done = subprocess.run(
            ["bash", str(spool), *args],
            env={**self.env, **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        lines = [line for line in self.log.read_text().splitlines() if not line.endswith("node.sh check")]
        return done.returncode, lines, done.stdout + done.stderr

    def run_here(self, script: str, *args: str, **env: str) -> tuple[int, list[str], str]:
        """The same of a script that is not for sbatch; DATA only where it is given."""
        self.log.write_text("")
        line = ["bash", str(self.root / "slurm" / script), *args]
        given = {k: v for k, v in self.env.items() if k != "DATA"} | env
        done = subprocess.run(line, env=given, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, self.log.read_text().splitlines(), done.stdout + done.stderr
