"""`megafuse sample`: prompts to the responses of one source model."""

from megafuse.config.sample import SampleConfig
from megafuse.observe.console import make_console
from megafuse.sampling.sample import Speed, sample

DESCRIPTION = "Sample the responses of one source; started again after a kill, it goes on where it stopped."
CONFIG = SampleConfig


def run(config: SampleConfig) -> int:
    """Sample, with a line a chunk: tokens a second and the time left."""
    console = make_console()
    err = make_console(stderr=True, highlight=False)

    def show(speed: Speed) -> None:
        minutes = speed.seconds_left / 60
        err.print(f"chunk {speed.done}/{speed.total}: {speed.tokens_per_second:,.0f} tokens/s, {minutes:,.1f} min left")

    result = sample(config, show)
    for path in result.damaged:
        console.print(f"[yellow]warning:[/yellow] a damaged chunk was set aside and made again: {path}", soft_wrap=True)
    for name, number in result.counts.items():
        console.print(f"{name}: {number:,}")
    state = f"{result.made} chunk(s) sampled; " + ("written" if result.complete else "other jobs are not done yet")
    console.print(f"{config.output}: {state}", soft_wrap=True)
    return 0
