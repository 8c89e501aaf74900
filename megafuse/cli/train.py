"""`megafuse train`: one training run, alone, under torchrun, or as a Slurm step."""

from megafuse.config.train import TrainConfig
from megafuse.errors import MegafuseError

DESCRIPTION = """Train the target model on a data set of prompt groups.

Runs alone, under torchrun (`torchrun --nproc-per-node=8 -m megafuse train run.toml`), or as a bare srun step. Started
again on the same run_dir, it goes on from the newest checkpoint and gives the same run."""
CONFIG = TrainConfig


def run(config: TrainConfig) -> int:
    """Train; returns the exit code."""
    from megafuse.parallel.quiet import quiet_dependencies

    with quiet_dependencies():
        from megafuse.training.outcome import write_outcome
        from megafuse.training.run import train

        try:
            train(config)
        except MegafuseError as error:
            if config.run_dir.is_dir():
                write_outcome(config.run_dir, error.exit_code, str(error))
            raise
    return 0
