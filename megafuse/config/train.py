"""What one training run is: `megafuse train run.toml --optim.lr 1e-5`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config
from megafuse.config.loss import LossConfig


class ParallelConfig(Config):
    """Layout of the ranks. Data parallel is what is left of the world size."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks: divides attention heads, KV heads, and the MLP width."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages. Without the two settings below they divide the number of layers."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks a pipeline stage (interleaved schedule): divides the layers of a stage. Needs pipeline > 1."""
    first_stage_layers: int | None = Field(None, ge=1)
    """Layers of the first stage, which also holds the embedding; the other stages share the rest evenly."""
    last_stage_layers: int | None = Field(None, ge=1)
    """Layers of the last stage, which also holds the LM head."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks: each computes a balanced part of every row's tokens."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks (MoE): divides the experts, and the ranks of a pipeline stage. Above 1 an expert is never
    split, at 1 its width is split over `tensor`."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor-parallel ranks (needs tensor > 1)."""

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence = true needs parallel.tensor > 1, got tensor = 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline > 1, got 1")
        uneven = self.first_stage_layers is not None or self.last_stage_layers is not None
        if uneven and self.pipeline == 1:
            raise ValueError("parallel.first_stage_layers / last_stage_layers need parallel.pipeline > 1, got 1")
        return self

    @property
    def expert_tensor(self) -> int:
        """Ways that the width of one expert is split."""
        return self.tensor if self.expert == 1 else 1

    @property
    def model_ranks(self) -> int:
        """Ranks that one replica of the model takes."""
        return self.tensor * self.pipeline * self.context


class OverlapConfig(Config):
    """Communication behind computation. Unset: what `parallel.policy` says for the backend and the layout."""

    grad_reduce: bool | None = None
    """Reduce a bucket's gradients over data-parallel ranks while backward goes on."""
    param_gather: bool | None = None
    """Gather the distributed optimizer's parameters while forward goes on (needs grad_reduce)."""
    p2p: bool | None = None
    """Send and receive between pipeline stages beside computation (the interleaved schedule only)."""
    tensor: bool | None = None
    """Transformer Engine's user buffers under tensor + sequence parallel linears. Rows get one fixed length."""


class ModelConfig(Config):
    """The target model and how it is computed."""

    path: Path
    """Checkpoint folder written by `megafuse convert import` or by a training run, or a Hugging Face folder."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Parameters and activations; the optimizer always keeps fp32 master weights. `auto`: bf16 where the devices of all
    ranks compute it (CUDA from sm_80 on, CPUs with avx512_bf16, amx_bf16 or Arm's bf16), else fp32; a run that goes on
    keeps what it began with, a new one takes that of its `reference.path`."""
    attention: Literal["auto", "flex", "sdpa", "te"] = "auto"
    """Core attention: `sdpa` anywhere; `flex` (FlexAttention, CUDA); `te` (Transformer Engine, CUDA, neither prefix
    sharing nor context parallelism). `auto`: flex on CUDA for heads of at least 16 dimensions, else sdpa."""
    layers: Literal["auto", "torch", "te"] = "auto"
    """Norms and linear layers: `te` where Transformer Engine is usable on CUDA, else mcore's own (`torch`)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: `selective` redoes core attention, `full` every layer."""


class DataConfig(Config):
    """Which groups, and how they become rows."""

    dataset: Path
    """Folder written by `megafuse build`."""
    max_row_tokens: int = Field(8192, ge=8)
    """Tokens that groups are packed into a row (one micro-batch) up to."""
    max_group_tokens: int | None = Field(None, ge=8)
    """A longer group is refused. Up to here a group above max_row_tokens makes the rows of its step that long.
    None: 4 x max_row_tokens. Without prefix sharing this is about the parts of a group (see prefix_sharing)."""
    prefix_sharing: bool = True
    """Compute a prompt once for all of its responses (exact). Off: every response carries its own copy, and a row need
    hold what one term of the loss combines, not a whole group: less memory, more time."""

    @model_validator(mode="after")
    def _groups_fill_rows(self) -> "DataConfig":
        if self.max_group_tokens is not None and self.max_group_tokens < self.max_row_tokens:
            raise ValueError(
                f"data.max_group_tokens = {self.max_group_tokens} is below data.max_row_tokens = "
                f"{self.max_row_tokens}; lower max_row_tokens too, or leave max_group_tokens unset"
            )
        return self


class OptimConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule, at most `lr`. A constant schedule has no use for it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of all steps spent warming up linearly."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW first-moment decay."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW second-moment decay."""
    eps: float = Field(1e-8, ge=1e-37)
    """AdamW epsilon; fp32 would make zero of a smaller one."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient-norm limit; 0 switches clipping off."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks (ZeRO-1)."""

    @model_validator(mode="after")
    def _falls(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr = {self.min_lr} is above optim.lr = {self.lr}; the schedule goes from lr down to "
                "min_lr: lower one, or raise the other"
            )
        return self


class CheckpointConfig(Config):
    """When the run saves, and what it keeps."""

    interval: int = Field(100, ge=0)
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep: int = Field(2, ge=1)
    """Newest complete checkpoints that stay on disk."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this many steps stay too; 0: none."""
    best_of: int = Field(2, ge=1)
    """The best of so many last evaluated checkpoints stays too, and BEST names it (needs held_out.dataset)."""
    async_save: bool = False
    """Write in a background process while training goes on. Stops and the end of the run still wait for it."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written (disk full, quota, read-only): stop with exit code 4, or go on without it."""
    max_save_errors: int = Field(3, ge=1)
    """Failed saves in a row that `continue` goes on after."""
    max_unsaved_steps: int = Field(0, ge=0)
    """Training never gets further than this from its last complete checkpoint: it waits for a save, and stops where
    that fails. 0: interval x (max_save_errors + 1)."""
    strict: bool = False
    """Refuse to start where the newest checkpoint fails verification (off: fall back to an older one, and say so)."""
    final_optimizer: bool = True
    """Store optimizer state in the last checkpoint too (off: weights only, a quarter of the size or less)."""


class ReferenceConfig(Config):
    """Where the reference log-probs of the preference losses come from."""

    path: Path | None = None
    """Cache written by `megafuse reference`. None: computed before the first step, into the run folder."""
    model: Path | None = None
    """Checkpoint of the reference policy; None: `model.path`, the policy that training starts from. One of another
    architecture than that needs `path`: a run computes with its own."""


class HeldOutConfig(Config):
    """Evaluation during training, at checkpoints."""

    dataset: Path | None = None
    """Folder written by `megafuse build`, of the kind that is trained on, with other prompts. Before each checkpoint
    of `checkpoint.interval` and at the end: loss, margin and the loss's other metrics over all of it."""


class GuardConfig(Config):
    """What the run watches for beside NaN. See docs/reliability.md."""

    hang_seconds: float = Field(600.0, ge=0, le=1e9)
    """Without progress for so long a rank dumps its stacks and the job ends with exit code 75; 0 never. The first step
    and saves get three times as long."""
    spike_factor: float | None = Field(None, gt=1)
    """A gradient norm above so many times the median of the last `spike_window` updates is refused. None: never."""
    spike_window: int = Field(32, ge=2)
    """Updates that the median is taken over."""
    on_spike: Literal["halt", "skip", "rollback"] = "skip"
    """As `on_nonfinite`, for spikes."""
    fingerprint_every: int = Field(0, ge=0)
    """Steps between comparisons of the data-parallel copies of every parameter; 0: none."""
    replay_every: int = Field(0, ge=0)
    """Steps between those that are computed twice: losses and gradients must agree to the bit before any update.
    Such a step takes twice as long. 0: none."""


class ObserveConfig(Config):
    """What the run tells its user."""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases (needs the extra `wandb`)."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense peak of one device in TFLOP/s, for MFU; None: known GPUs by name, no MFU elsewhere."""


class TrainConfig(Config):
    """One training run."""

    run_dir: Path
    """Run folder. Started again on the same folder, the run goes on from its newest checkpoint."""
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    overlap: OverlapConfig = OverlapConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reference: ReferenceConfig = ReferenceConfig()
    observe: ObserveConfig = ObserveConfig()
    guard: GuardConfig = GuardConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    global_batch_size: int = Field(128, ge=1)
    """Prompts (groups) an optimizer step, over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes over the data set; the last batch of a pass may be smaller."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps; the schedule is laid out for the shorter run."""
    seed: int = Field(0, ge=0, le=1 << 62)
    """Order of the groups."""
    on_nonfinite: Literal["halt", "skip", "rollback"] = "halt"
    """A NaN or infinite loss or gradient: stop with exit code 86; skip the update on every rank and go on; or go back
    to the newest checkpoint and come again without that batch. Found in the weights before a save, `skip` stops too."""
    max_consecutive_skips: int = Field(3, ge=1)
    """Skips in a row, and roll-backs in one start, after which the run stops all the same."""
    allow_change: tuple[str, ...] = ()
    """Fields whose value may differ from what the run folder began with (`--allow_change optim.lr`). Each change acts
    from the next step on, or is refused (see docs/reliability.md), and is written into the run folder and into the
    manifests of its later checkpoints."""
