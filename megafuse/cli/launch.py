"""`megafuse launch`: one recipe of slurm/, submitted or run here, by NeMo-Run or without it."""

import importlib.util
import os
from collections.abc import Sequence

from megafuse.config.launch import LaunchConfig, WhereConfig
from megafuse.launch.job import Job, job_of
from megafuse.launch.plain import Result, run_plainly
from megafuse.observe.console import make_console

DESCRIPTION = """Run a recipe: a script of slurm/, from scored answers to a Hugging Face folder.

    megafuse launch fusepo_llama8b --model runs/fusesft/hf --data 'scored/*.jsonl.gz' --nodes 4 --time 12:00:00
    megafuse launch fusepo_llama8b --on local --gpus_per_node 2 --env TP=2 --set optim.lr=8e-7 --model M --data D

does what `sbatch slurm/fusepo_llama8b.sh` does, with the same node checks, requeue and resume. Every default is the
script's own; --dry_run shows the script that would be submitted and the variables that it knows."""
CONFIG = LaunchConfig


def run(config: LaunchConfig) -> int:
    """Launch, or show what would be launched; the exit code is 1 where a job is known not to have succeeded."""
    console = make_console(soft_wrap=True, highlight=False)
    job = job_of(config)
    if config.dry_run:
        show(job, config)
        return 0
    results = start([job], config)
    for result in results:
        console.print(f"{result.name}: {result.state}{f', job {result.job}' if result.job else ''}; run {job.run}")
        if result.state == "SUBMITTED":
            console.print('  squeue -o "%i %j %T %k" shows its step; submitted again it goes on where it stopped')
    return 0 if all(result.state in ("SUCCEEDED", "SUBMITTED") for result in results) else 1


def start(jobs: Sequence[Job], config: WhereConfig, *, quiet: bool = False) -> list[Result]:
    """Submit or run the jobs, the way that `config` says."""
    if config.via == "plain":
        return run_plainly(jobs, config, quiet=quiet)
    from megafuse.launch.nemo import run_with_nemo

    return run_with_nemo(jobs, config, quiet=quiet)


def show(job: Job, config: WhereConfig) -> None:
    """Print what would run. Without NeMo-Run its header is left out, and said to be."""
    print(f"# {job.name}: by hand, in {job.root}\n#   {job.by_hand}")
    for name, text in job.notes.items():
        print(f"#   {name}  {text}")
    if config.on == "local":
        from megafuse.launch.local import local_environment

        lines = [f"export {k}={v}" for k, v in local_environment(job, os.environ).items() if k != "SLURM_JOB_ID"]
        print("\n".join(["# on this machine:", *lines, job.body]))
    elif config.via == "nemo-run" and importlib.util.find_spec("nemo_run"):
        from megafuse.launch.nemo import nemo_script

        print("# submitted by NeMo-Run:\n" + nemo_script(job, config))
    else:
        if config.via == "nemo-run":
            print("# NeMo-Run is not installed: its script has these options and lines, and some more of its own")
        print(job.batch_script)
