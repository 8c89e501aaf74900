"""`megafuse train`: one training run, alone, under torchrun, or as a Slurm step."""

from megafuse.config.train import TrainConfig

DESCRIPTION = """Train the target model on a data set of prompt groups.

Runs alone, under torchrun (`torchrun --nproc-per-node=8 -m megafuse train run.toml`), or as a bare srun step. Started
again on the same run_dir, it goes on from the newest checkpoint and gives the same run."""
CONFIG = TrainConfig


def run(config: TrainConfig) -> int:
    """Train; returns the exit code."""
    from megafuse.parallel.quiet import quiet_dependencies

    with quiet_dependencies():
        from megafuse.training.run import train

        train(config)
    return 0
