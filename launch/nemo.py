"""Jobs through NeMo-Run: its SlurmExecutor (here or through SSH) and its LocalExecutor run the recipes of slurm/.

What NeMo-Run generates has no signal trap, fixes a port and ships committed files only. So the recipe itself takes the
place of the batch script (`exec`), and starts the same node.sh on every node that plain `sbatch` would.
"""

import contextlib
import importlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megafuse.config.launch import WhereConfig
from megafuse.errors import ConfigError
from megafuse.launch.job import Job
from megafuse.launch.local import local_environment
from megafuse.launch.plain import Result

ACCOUNTING = Path(__file__).resolve().parent / "without_accounting"
EXPLANATION = """\
# The recipe is the batch script from here on: it hears Slurm's signals, requeues its job, and starts slurm/node.sh on
# every node. What NeMo-Run has written below is not reached."""


def nemo_run() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed, or not whole; says how to repair it, and how to do without.
    """
    try:
        return importlib.import_module("nemo_run")
    except ImportError as error:
        raise ConfigError(
            f"via = 'nemo-run' needs NeMo-Run ({error}): run `pip install -e '.[launch]'` in the repository "
            "(it holds leptonai below 0.47: newer ones break it), or set --via plain, which needs only sbatch and bash"
        ) from None


def run_with_nemo(jobs: Sequence[Job], config: WhereConfig, *, quiet: bool = False) -> list[Result]:
    """As `run_plainly`, through one NeMo-Run experiment (one for each job where they run here, one after another)."""
    run = nemo_run()
    groups = [[job] for job in jobs] if config.on == "local" else [list(jobs)]
    results: list[Result] = []
    for group in groups:
        if config.host is None:
            for job in group:
                Path(job.run).mkdir(parents=True, exist_ok=True)
        waits = config.on == "local" or config.follow
        quietly = {"skip_status_at_exit": True, "enable_goodbye_message": False, "log_level": "WARNING"}
        with _sacct_answers(config):
            with run.Experiment(group[0].name, **quietly) as experiment:
                for job in group:
                    experiment.add(_task(run, job, config, quiet), executor=_executor(run, job, config), name=job.name)
                experiment.run(detach=not waits, tail_logs=config.on == "local" and not quiet)
            # leaving the experiment has waited for it, where it was to be waited for
            for job, task in zip(group, experiment.jobs):
                number = str(task.handle).rpartition("/")[2] if config.on == "slurm" else ""
                results.append(Result(job.name, task.state.name if waits else "SUBMITTED", number))
    return results


def nemo_script(job: Job, config: WhereConfig) -> str:
    """The sbatch script that NeMo-Run would submit; nothing is written."""
    run = nemo_run()
    slurm = importlib.import_module("nemo_run.core.execution.slurm")
    executor = _executor(run, job, config)
    executor.experiment_id, executor.job_dir = "EXPERIMENT", f"EXPERIMENT/{job.name}"
    executor.tunnel.job_dir = executor.tunnel.job_dir or "EXPERIMENT"
    request = slurm.SlurmBatchRequest(
        launch_cmd=["sbatch", "--requeue", "--parsable"], jobs=[job.name],
        command_groups=[["bash", *map(shlex.quote, (job.script, *job.arguments))]], executor=executor, max_retries=0,
        extra_env={}, launcher=None,
    )  # fmt: skip
    return str(request.materialize())


def _task(run: Any, job: Job, config: WhereConfig, quiet: bool) -> Any:
    if config.on == "slurm":
        return run.Script(path=job.script, args=[shlex.quote(word) for word in job.arguments], entrypoint="bash")
    lines = [f"export {k}={shlex.quote(v)}" for k, v in local_environment(job, os.environ).items()]
    if quiet:
        lines.append(f"exec >>{shlex.quote(os.path.join(job.run, job.name + '.out'))} 2>&1")
    return run.Script(inline="\n".join([*lines, job.body]), entrypoint="bash")


def _executor(run: Any, job: Job, config: WhereConfig) -> Any:
    if config.on == "local":
        return run.LocalExecutor()
    slurm = importlib.import_module("nemo_run.core.execution.slurm")
    parameters = {name.replace("-", "_"): True if value is None else value for name, value in job.options.items()}
    return run.SlurmExecutor(
        account=None,  # in the parameters, where there is one
        job_name_prefix="megafuse.",  # else NeMo-Run makes one out of the account
        job_details=slurm.SlurmJobDetails(job_name=job.name),
        time=None,  # its own default is ten minutes
        tunnel=_tunnel(run, config),
        packager=run.Packager(),  # nothing is shipped: the job runs in the repository
        setup_lines=f"{EXPLANATION}\n{job.body}",
        additional_parameters=parameters,
        retries=0,  # the recipe requeues, and knows when to stop
    )


def _tunnel(run: Any, config: WhereConfig) -> Any:
    if config.host is None:
        return run.LocalTunnel(job_dir="")
    user, _, host = config.host.partition("@")
    identity = str(config.identity) if config.identity is not None else None
    return run.SSHTunnel(host=host, user=user, job_dir=f"{config.remote_root}/runs/nemo_run", identity=identity)


@contextlib.contextmanager
def _sacct_answers(config: WhereConfig) -> Iterator[None]:
    """NeMo-Run knows a job's state from sacct alone; where there is no accounting, ask the controller instead."""
    before = os.environ.get("PATH", os.defpath)
    if config.on == "slurm" and config.host is None:
        try:
            silent = subprocess.run(["sacct", "-n", "-X"], capture_output=True).returncode != 0
        except FileNotFoundError:
            silent = True
        if silent:
            os.environ["PATH"] = os.pathsep.join([str(ACCOUNTING), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
