"""Configuration of `megafuse score`: responses to scored responses."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config


class ScoreConfig(Config):
    """Which responses, which verifier, which reward, and where they go."""

    inputs: tuple[Path, ...] = Field(min_length=1)
    """Responses: .jsonl files or gzips of them, one a source or with several sources; joined by prompt_id."""
    output: Path
    """Scored responses (.jsonl, or .jsonl.gz). Beside it: OUTPUT.chunks/ (it stays), OUTPUT.manifest.json."""
    prompts: Path | None = None
    """The prompts that were sampled from: a response to any other prompt is refused."""

    verify: Literal["auto", "none"] = "auto"
    """auto: `correct` by the tests of a prompt, or by its gold answer where its domain is math. none: keep as given."""
    reward: Literal["armorm", "classifier", "judge", "correct", "keep"] = "armorm"
    """armorm: ArmoRM-Llama3-8B-v0.1's layout. classifier: any sequence classifier with one output. judge: a server.
    correct: 1 or 0 by the verifier. keep: the rewards that the responses have."""
    model: Path | None = None
    """Hugging Face folder of the reward model, for armorm and classifier."""
    compare: bool = False
    """Responses have `correct` already: write where the verifier disagrees to OUTPUT.disagreements.jsonl."""

    system_messages: Literal["template", "first_user_turn"] = "template"
    """armorm, classifier. first_user_turn: a system message becomes the beginning of the first user message, a blank
    line between, for models whose template knows no system role (Gemma 2)."""
    batch_tokens: int = Field(16384, ge=1)
    """Padded tokens of a batch of the reward model."""
    max_length: int = Field(4096, ge=2)
    """Tokens of a conversation; a longer one gets no reward (it is never cut)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the reward model's weights. auto: bfloat16 on a CUDA device that computes it (sm_80 on), else
    float32; of an output that was begun before, what it began with."""
    device: str = "auto"
    """torch device. auto: the CUDA device of LOCAL_RANK, or the CPU."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """judge: an OpenAI-compatible server."""
    judge_model: str = "judge"
    """judge: the model's name there."""
    judge_template: Path | None = None
    """judge: a text with {prompt} and {response} that asks for "Rating: [[number]]". None: 1 to 10, general quality."""
    api_key_env: str = "OPENAI_API_KEY"
    """judge: environment variable that holds the key."""
    request_seconds: float = Field(120.0, gt=0, le=1e9)
    """judge: time for one request."""
    retries: int = Field(5, ge=0)
    """judge: further tries of a request."""

    workers: int = Field(4, ge=1)
    """Answers verified, programs run or judgements asked for at a time."""
    math_seconds: float = Field(20.0, gt=0, le=1e9)
    """After which a mathematics answer has no verdict (`correct` null)."""
    code_seconds: float = Field(10.0, gt=0, le=1e9)
    """After which a program has failed."""
    code_memory: int = Field(1 << 30, ge=1 << 26)
    """Bytes of memory of one process of a program."""
    unsafe_no_sandbox: bool = False
    """Run responses' code WITHOUT isolation where there is no bubblewrap: it can do whatever you can."""

    chunk: int = Field(64, ge=1)
    """Prompts that are scored and written at a time: what a killed job loses at most."""
    job: int = Field(0, ge=0)
    """This job of `jobs`. Under torchrun the rank within a job comes on top."""
    jobs: int = Field(1, ge=1)
    """Jobs that share the work, for example the tasks of a Slurm array."""

    @model_validator(mode="after")
    def _consistent(self) -> "ScoreConfig":
        if self.reward in ("armorm", "classifier") and self.model is None:
            raise ValueError(f"reward = {self.reward!r} needs model = FOLDER")
        if self.reward == "correct" and self.verify == "none" and not self.compare:
            raise ValueError('reward = "correct" needs verify = "auto"')
        if self.job >= self.jobs:
            raise ValueError(f"job = {self.job} must be below jobs = {self.jobs}; the first is 0")
        return self
