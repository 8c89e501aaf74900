"""`megafuse data report`: one HTML page about scored answers."""

from pathlib import Path

import tyro
from pydantic import Field

from megafuse.config.base import Config
from megafuse.data.reader import check_output
from megafuse.data.report import collect
from megafuse.data.store import read_manifest
from megafuse.data.tokenise import token_counter
from megafuse.errors import DataError
from megafuse.observe.console import make_console
from megafuse.observe.data_report import page
from megafuse.observe.manifest import atomic_file

DESCRIPTION = (
    "One self-contained HTML page: rewards, lengths, who wins, which alpha mixes, pairs, drops, groups to read."
)


class DataReportConfig(Config):
    """Which answers, and where the page goes."""

    files: tyro.conf.Positional[tuple[Path, ...]] = Field(min_length=1)
    """Scored answers: .jsonl files, or gzips of them."""
    output: Path = Path("data_report.html")
    """The page."""
    title: str = "Scored answers"
    """Its heading."""
    reward_field: str = Field("reward", min_length=1)
    """Key of a response that holds its reward."""
    tokenizer: Path | None = None
    """Hugging Face folder: lengths in its tokens. None: in characters."""
    datasets: tuple[Path, ...] = ()
    """Data sets built from these answers: what they left out is shown too."""
    seed: int = 0
    """Which ten groups are shown, and, as in `megafuse build`, which of equal rewards come first."""


CONFIG = DataReportConfig


def run(config: DataReportConfig) -> int:
    """Write the page."""
    check_output(config.output, config.files)
    manifests = []
    for path in config.datasets:
        manifest = read_manifest(path)
        if manifest is None:
            raise DataError(f"datasets: {path} holds no megafuse data set")
        manifests.append(manifest)
    lengths = token_counter(config.tokenizer) if config.tokenizer is not None else None
    data = collect(config.files, reward_field=config.reward_field, lengths=lengths, seed=config.seed)
    if not data.prompts:
        raise DataError(f"{', '.join(map(str, config.files))}: no prompt has a response with a text and a reward")
    text = page(data, title=config.title, unit="tokens" if lengths else "characters", manifests=manifests)
    with atomic_file(config.output) as file:
        file.write(text.encode())
    make_console().print(f"{config.output}: {data.prompts:,} prompts, {len(data.rewards)} sources", soft_wrap=True)
    return 0
