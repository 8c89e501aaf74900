"""`megafuse doctor parity`: is every layout right on these machines?"""

import sys

from megafuse.config.parity import ParityConfig

DESCRIPTION = """Run a tiny random model in every layout that fits the ranks at hand, and print how far its loss, its
log-probs, the gradient of every parameter and its norm are from one process in float64 without Megatron. Exit status
1: a layout is out of bounds. Under torchrun or srun it uses their ranks (give --seed then, the same everywhere); alone
it starts --processes of its own."""

CONFIG = ParityConfig


def run(config: ParityConfig) -> int:
    """Print the table; 0 when every difference is within the tolerance."""
    from megafuse.doctor.parity import (
        Progress,
        check_parity,
        parity,
        parity_in_processes,
        report,
        resolve_seed,
        verdict,
    )
    from megafuse.observe.manifest import write_json_atomic
    from megafuse.parallel.cpu_runtime import compile_when_called
    from megafuse.parallel.quiet import quiet_dependencies
    from megafuse.testing.distributed import run_distributed

    with quiet_dependencies(), compile_when_called():
        config = resolve_seed(config)
        check_parity(config)
        print(f"{config.architecture}, {config.precision}, seed {config.seed}", file=sys.stderr, flush=True)
        if config.processes > 1:
            cells = run_distributed(parity_in_processes, config.processes, config, timeout=3600.0)[0]
        else:
            cells = parity(config, Progress())
    if not cells:  # another rank has them
        return 0
    ok = verdict(config, cells)
    if config.out:
        write_json_atomic(config.out, report(config, cells))
    return 0 if ok else 1
