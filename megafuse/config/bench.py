"""What one throughput measurement is: `megafuse bench --model.path llama-3.2-1b --data.path scored.jsonl.gz`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config
from megafuse.config.train import ModelConfig, OverlapConfig, ParallelConfig


class BenchModelConfig(ModelConfig):
    """The shape of the target, and how it is computed. Weights are random: nothing is downloaded."""

    path: Path = Path("llama-3.2-1b")
    """A named shape (a wrong name lists them), or a folder with config.json, or a checkpoint; only its sizes count."""


class BenchDataConfig(Config):
    """Whose lengths, and how groups become rows. Token ids are random."""

    path: Path
    """Data set folder written by `megafuse build`, or scored answers (.jsonl, .jsonl.gz)."""
    tokenizer: Path | None = None
    """Scored answers: Hugging Face folder to count tokens with, chat template included. None: by bytes."""
    bytes_per_token: float = Field(4.0, gt=0)
    """Scored answers without a tokenizer: tokens are UTF-8 bytes / this, rounded up; a response has one more, its
    end of turn."""
    max_length: int = Field(2048, ge=2)
    """Scored answers: tokens of a prompt and one response; longer responses are left out, as `build` does."""
    max_row_tokens: int = Field(8192, ge=8)
    """Tokens that groups are packed into a row (one micro-batch) up to."""
    max_group_tokens: int | None = Field(None, ge=8)
    """Prompts whose largest group is longer are left out of every measurement. None: 4 x max_row_tokens."""


class BenchObserveConfig(Config):
    """What is found out beside the step time."""

    peak_tflops: float | None = Field(None, gt=0)
    """Dense peak of one device in TFLOP/s, for MFU; None: known GPUs by name, no MFU elsewhere."""
    breakdown: bool = True
    """One more step of each kind, with marks around attention, linears, LM head, optimizer and communication."""
    trace: Path | None = None
    """Folder for a torch profiler trace of one more step of each kind (rank 0), to be opened in Perfetto."""


class BenchConfig(Config):
    """End-to-end training throughput: one batch of prompts, for every number of sources, with and without sharing."""

    out: Path | None = None
    """JSON file for the results, written after each kind (`complete` is false until the last). None: only the table."""
    model: BenchModelConfig = BenchModelConfig()
    data: BenchDataConfig
    loss: Literal["sft", "dpo", "ln_dpo", "simpo", "rloo", "wrpo"] = "ln_dpo"
    """The loss of the stage; its hyper-parameters do not change the time. wrpo needs sources = 2."""
    sources: tuple[Annotated[int, Field(ge=1)], ...] = (4, 16)
    """Numbers of sources kept a prompt, each measured. Above what a prompt has, it borrows the responses of others."""
    responses_per_source: int | None = Field(None, ge=1)
    """Responses kept of each source: its best and its worst, of more also the next best. None: 1 for sft, else 2."""
    prefix_sharing: Literal["both", "shared", "separate"] = "both"
    """shared: a prompt is computed once for all its responses. separate: every response carries its own copy."""
    parallel: ParallelConfig = ParallelConfig()
    overlap: OverlapConfig = OverlapConfig()
    observe: BenchObserveConfig = BenchObserveConfig()
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks (ZeRO-1)."""
    global_batch_size: int = Field(64, ge=1)
    """Prompts (groups) an optimizer step, over all ranks. Every step and every kind has the same prompts."""
    steps: int = Field(5, ge=1)
    """Measured steps of each kind; their median counts."""
    warmup: int = Field(2, ge=0)
    """Steps of each kind before them: compilation, allocation, the optimizer's state."""
    seed: int = Field(0, ge=0, le=1 << 62)
    """Which prompts, which borrowed responses, which token ids, which weights."""

    @model_validator(mode="after")
    def _consistent(self) -> "BenchConfig":
        if not self.sources:
            raise ValueError("sources = [] measures nothing; give at least one number")
        wanted = self.resolved_responses
        if self.loss in ("dpo", "ln_dpo", "simpo", "wrpo") and wanted != 2:
            raise ValueError(f"responses_per_source = {wanted}: {self.loss} takes the best and the worst, so 2")
        if self.loss == "rloo" and wanted < 2:
            raise ValueError(f"responses_per_source = {wanted}: rloo compares the responses of a source, so at least 2")
        if self.loss == "wrpo" and self.sources != (2,):
            raise ValueError(
                f"sources = {list(self.sources)}: a wrpo group is the best response of a source and two of the target "
                f"itself; set sources = [2]"
            )
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources = {list(self.sources)} names a number twice")
        return self

    @property
    def resolved_responses(self) -> int:
        """responses_per_source, with None resolved by the loss."""
        return self.responses_per_source or (1 if self.loss == "sft" else 2)

    @property
    def sharing(self) -> tuple[bool, ...]:
        """The kinds to measure: with prefix sharing (True) and without."""
        return {"both": (True, False), "shared": (True,), "separate": (False,)}[self.prefix_sharing]

    @property
    def group_limit(self) -> int:
        """max_group_tokens, with None resolved as training does."""
        return self.data.max_group_tokens or 4 * self.data.max_row_tokens
