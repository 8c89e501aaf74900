"""`megafuse launch sweep`: many jobs over sources, alpha, k, loss and target, and one table of what came of them."""

from pathlib import Path

from rich.console import Console

from megafuse.cli.launch import start
from megafuse.config.launch import SweepConfig
from megafuse.launch.plain import Result
from megafuse.launch.summary import row_of, write_summary
from megafuse.launch.sweep import Point, begin, last_start, points_of, queued, remember
from megafuse.observe.console import make_console

DESCRIPTION = """Run a recipe at every point of a grid, and write one table.

    megafuse launch sweep examples/sweep.toml --on slurm            submit every point
    megafuse launch sweep examples/sweep.toml --on slurm --follow   ... and wait for the last
    megafuse launch sweep examples/sweep.toml --on local            here, one after another

A point is a data set (sources, alpha, k), a training run (loss, target) and its rank accuracy on held-out prompts, in
a folder named by its settings. The same command again goes on with what is missing: finished points are left alone,
waiting and running ones too, all others go on from their last checkpoint. Each call writes summary.md, summary.csv and
summary.json as things stand."""
CONFIG = SweepConfig


def run(config: SweepConfig) -> int:
    """Start what is missing, then write the table; 1 where a point is known to have failed."""
    console = make_console(highlight=False)
    points = points_of(config)
    missing = [point for point in points if not point.done and not queued(last_start(point.folder).get("job", ""))]
    if config.dry_run:
        for point in points:
            print(f"# {point.name}" + ("" if point in missing else ": done, or in the queue"))
            print(point.job.by_hand if config.on == "slurm" else point.job.body)
        print(f"# {len(missing)} of {len(points)} points would be started")
        return 0
    console.print(f"{len(points)} points, {len(missing)} to start", soft_wrap=True)
    results = _start(missing, points, config, console)
    folder = Path(points[0].job.run).parent
    console.print(write_summary(folder, [row_of(point) for point in points]))
    console.print(f"written: {folder}/summary.md, summary.csv, summary.json", soft_wrap=True)
    return 0 if all(result.state in ("SUCCEEDED", "SUBMITTED") for result in results) else 1


def _start(missing: list[Point], points: list[Point], config: SweepConfig, console: Console) -> list[Result]:
    """On a cluster all at once; here one by one, so that each finds what the one before it has finished."""
    groups = [[point] for point in missing] if config.on == "local" else [missing] if missing else []
    results: list[Result] = []
    for group in groups:
        for point in group:
            begin(point, points)
            if config.on == "local":
                console.print(f"{point.name}: {point.folder}/{point.name}.out", soft_wrap=True)
        found = {result.name: result for result in start([point.job for point in group], config, quiet=True)}
        for point in group:
            remember(point, found[point.name].state, found[point.name].job)
        results += found.values()
    return results
