"""Configuration of `megafuse sample`: prompts to the responses of one source model."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config


class SampleConfig(Config):
    """Which prompts, which source, how it samples, and where its responses go."""

    prompts: tuple[Path, ...] = Field(min_length=1)
    """Prompts: .jsonl files or gzips of them."""
    output: Path
    """Responses of this one source (.jsonl, or .jsonl.gz). Beside it: OUTPUT.chunks/, OUTPUT.manifest.json."""
    source: str = Field(min_length=1)
    """Name of the source in the data. A name of the registry (`megafuse sample list`) brings its settings."""
    engine: Literal["vllm", "server"] = "vllm"
    """vllm: in this process, offline. server: any OpenAI-compatible server."""
    model: Path | None = None
    """vllm: Hugging Face folder of the source."""
    model_name: str = ""
    """Name that is written into the responses, and asked for of a server. "": the folder's name, or the source."""

    n: int | None = Field(None, ge=1)
    """Responses a prompt. None: by domain, as FuseChat-3.0 does: 5, coding 8, chinese 1."""
    temperature: float | None = Field(None, ge=0)
    """None: the registry's; 0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    """None: the registry's."""
    repetition_penalty: float | None = Field(None, gt=0)
    """None: the registry's. 1: none."""
    max_tokens: int = Field(2048, ge=1)
    """New tokens of a response; one that reaches it is kept with finish_reason "length"."""
    system_messages: Literal["template", "first_user_turn"] = "template"
    """first_user_turn: a system message becomes the beginning of the first user message, a blank line between, for
    models whose template knows no system role (Gemma 2)."""
    seed: int = 0
    """With source, prompt_id and number of the response it makes the seed of each response."""
    domains: tuple[str, ...] = ()
    """Only prompts of these domains. Empty: all."""

    tensor_parallel: int = Field(1, ge=1)
    """vllm: GPUs that share the model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """vllm: precision of the weights. auto: that of the folder; float32 on a CPU that emulates bf16; of an output that
    was begun before, what it began with."""
    max_model_len: int = Field(4096, ge=2)
    """vllm: tokens of a prompt and its response; a prompt that leaves no room for one token is refused beforehand."""
    gpu_memory: float = Field(0.9, gt=0, le=1)
    """vllm: share of the GPU's memory."""
    cpu_cache_gib: int = Field(2, ge=1)
    """vllm on a CPU: memory of the key-value cache."""
    chat_template: Path | None = None
    """vllm: Jinja file that replaces the template of the folder."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """server: its address."""
    api_key_env: str = "OPENAI_API_KEY"
    """server: environment variable that holds the key."""
    request_seconds: float = Field(600.0, gt=0, le=1e9)
    """server: time for one request."""
    retries: int = Field(5, ge=0)
    """server: further tries of a request."""
    concurrency: int = Field(32, ge=1)
    """server: requests at a time."""

    chunk: int = Field(64, ge=1)
    """Prompts that are sampled and written at a time: what a killed job loses at most."""
    job: int = Field(0, ge=0)
    """This job of `jobs`."""
    jobs: int = Field(1, ge=1)
    """Jobs that share this source, for example the tasks of a Slurm array."""

    @model_validator(mode="after")
    def _consistent(self) -> "SampleConfig":
        if self.engine == "vllm" and self.model is None:
            raise ValueError('engine = "vllm" needs model = FOLDER')
        if self.job >= self.jobs:
            raise ValueError(f"job = {self.job} must be below jobs = {self.jobs}; the first is 0")
        return self
