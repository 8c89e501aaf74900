"""Which loss, and its hyper-parameters: flat, and only those that the loss has."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta",),
    "ln_dpo": ("beta",),
    "simpo": ("beta", "gamma"),
    "rloo": ("beta_kl",),
    "wrpo": ("beta",),
}
"""Loss -> fields without a default: the paper's values are not public, and nobody's guess is as good as a search."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"reduction": "sequence_mean"},
    "dpo": {"label_smoothing": 0.0},
    "ln_dpo": {"label_smoothing": 0.0},
    "simpo": {"label_smoothing": 0.0},
    "rloo": {"surrogate": "reinforce"},
    "wrpo": {"label_smoothing": 0.0, "alpha_max": 0.1},
}
"""Loss -> fields with a default, and it. rloo's `clip` belongs to `surrogate = "clipped_ratio"` only."""

CLIP = 0.2


class LossConfig(Config):
    """The loss. A field that the named loss does not use stays unset; setting it is an error, not a no-op."""

    name: Literal["sft", "dpo", "ln_dpo", "simpo", "rloo", "wrpo"]
    """sft: FuseSFT or plain SFT. The others are FusePO with that preference loss; see megafuse.losses."""
    beta: float | None = Field(None, gt=0)
    """dpo, ln_dpo, simpo, wrpo (required): scale of the implicit reward. FuseChat-3.0: 0.01 for dpo, 10 for ln_dpo."""
    gamma: float | None = Field(None, ge=0)
    """simpo (required): target margin, subtracted inside the sigmoid; not its ratio to beta."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """dpo, ln_dpo, simpo, wrpo: probability that a preference label is flipped. Default 0."""
    reduction: Literal["sequence_mean", "sequence_sum", "token_mean"] | None = None
    """sft: mean NLL of a response, its sum, or weighted mean over tokens. Default sequence_mean."""
    beta_kl: float | None = Field(None, ge=0)
    """rloo (required): weight of the KL penalty in the reward. The paper searched 1e-4 to 1e-1."""
    surrogate: Literal["reinforce", "clipped_ratio"] | None = None
    """rloo: A * log pi, or PPO's clipped ratio to the reference. Default reinforce."""
    clip: float | None = Field(None, gt=0, lt=1)
    """rloo with surrogate = clipped_ratio: half-width of the clip range around 1. Default 0.2."""
    alpha_max: float | None = Field(None, ge=0, le=1)
    """wrpo: weight of the source's response at the end of training; rises linearly from 0. Default 0.1 (WRPO's)."""

    def settings(self) -> dict[str, Any]:
        """The fields that this loss uses, without its name: keyword arguments of the loss function."""
        return {field: getattr(self, field) for field in sorted(self._used())}

    def _used(self) -> set[str]:
        clip = {"clip"} if self.surrogate == "clipped_ratio" else set()
        return {*REQUIRED[self.name], *DEFAULTS[self.name], *clip}

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """Defaults depend on the loss, so that a dumped configuration holds its fields and no others."""
        if not isinstance(values, Mapping):
            return values
        given = {field: value for field, value in values.items() if value is not None}
        name = given.get("name")
        defaults = dict(DEFAULTS.get(name, {})) if isinstance(name, str) else {}
        if name == "rloo" and given.get("surrogate") == "clipped_ratio":
            defaults["clip"] = CLIP
        return {**defaults, **given}

    @model_validator(mode="after")
    def _only_what_the_loss_uses(self) -> "LossConfig":
        problems = [
            f"{field} is missing: {self.name} needs it, and it has no default; set loss.{field}"
            for field in REQUIRED[self.name]
            if getattr(self, field) is None
        ]
        for field in type(self).model_fields:
            value = getattr(self, field)
            if field == "name" or value is None or field in self._used():
                continue
            users = [n for n in REQUIRED if field in (*REQUIRED[n], *DEFAULTS[n])]
            who = ", ".join(users) or 'rloo with surrogate = "clipped_ratio"'
            problems.append(
                f"{field} = {value!r} has no effect on {self.name}: only {who} use(s) it; "
                'remove it, or set it to "none"'
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
