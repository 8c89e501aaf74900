"""`megafuse bench`: how fast training would be, on real lengths, with random weights."""

from megafuse.config.bench import BenchConfig

DESCRIPTION = """Measure end-to-end training throughput: any target's shape, any data's lengths, any loss and layout.

Weights and tokens are random, lengths are real: nothing is downloaded, and no tokenizer is needed. For every number of
sources, with prefix-shared and with separate rows: seconds a step, prompts/s, responses/s, tokens/s, MFU, peak memory,
and where the time goes. The JSON file is written after each of them; one that raises, for want of memory perhaps, is in
its list `failed`, and the next one begins (with several processes the first error ends all). Runs alone, under torchrun
(`torchrun --nproc-per-node=8 -m megafuse bench ...`), or as a bare srun step; slurm/bench.sh submits it."""
CONFIG = BenchConfig


def run(config: BenchConfig) -> int:
    """Measure, print the table on rank 0; returns the exit code."""
    import sys

    from megafuse.parallel.cpu_runtime import compile_when_called
    from megafuse.parallel.quiet import quiet_dependencies

    with quiet_dependencies(), compile_when_called():
        from megafuse.bench.report import tables
        from megafuse.bench.run import bench
        from megafuse.observe.console import make_console

        report = bench(config)
    if report:
        console = make_console(highlight=False)
        for table in tables(report):
            console.print(table)
        if config.out:
            console.print(f"written: {config.out}")
        for kind in report["failed"]:
            rows = "shared" if kind["prefix_sharing"] else "separate"
            print(f"K={kind['sources']}, {rows} rows, was not measured: {kind['failed']}", file=sys.stderr)
    return 1 if report and report["failed"] else 0
