"""`megafuse train`: one training run, alone, under torchrun, or as a Slurm step."""

import os
import sys

from megafuse.config.train import TrainConfig
from megafuse.errors import MegafuseError, PreemptedError, TerminatedError

DESCRIPTION = """Train the target model on a data set of prompt groups.

Runs alone, under torchrun (`torchrun --nproc-per-node=8 -m megafuse train run.toml`), or as a bare srun step. Started
again on the same run_dir, it goes on from the newest checkpoint and gives the same run."""
CONFIG = TrainConfig


def run(config: TrainConfig) -> int:
    """Train; returns the exit code."""
    from megafuse.parallel.cpu_runtime import compile_when_called
    from megafuse.parallel.quiet import quiet_dependencies

    with quiet_dependencies(), compile_when_called():
        from megafuse.training.outcome import write_outcome
        from megafuse.training.run import train

        try:
            train(config)
        except MegafuseError as error:
            if config.run_dir.is_dir():
                write_outcome(config.run_dir, error.exit_code, str(error))
            planned = isinstance(error, PreemptedError | TerminatedError)
            if planned and os.environ.get("MEGAFUSE_PLANNED_STOP") == "0":
                # slurm/node.sh reads the outcome; any other code and torchrun reports a crash, page by page
                if os.environ.get("RANK", "0") == "0":
                    print(error, file=sys.stderr, flush=True)
                return 0
            raise
    return 0
