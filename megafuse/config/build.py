"""Configuration of `megafuse build`: scored answers to a tokenised data set."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config
from megafuse.config.rules import EVERY_DOMAIN, DomainRule

Kind = Literal["sft", "pair", "rloo", "wrpo", "rank"]
SELECTIONS: dict[str, tuple[str, ...]] = {
    "sft": ("top_k_all", "top1_per_source", "single_best"),
    "pair": ("per_source", "top1"),
    "rloo": ("per_source", "top1"),
    "wrpo": (),
    "rank": (),
}
PART_OF_KIND = {"sft": "sft", "pair": "po", "rloo": "po", "wrpo": "po", "rank": "eval"}
ALPHA_OF_KIND = {"sft": 1e-2, "pair": 5e-3, "rloo": 5e-3}


class BuildConfig(Config):
    """Which prompts, which responses, which terms, how they are tokenised, and where they go."""

    inputs: tuple[Path, ...] = Field(min_length=1)
    """Scored answers: .jsonl files or gzips of them, read in this order."""
    output: Path
    """Folder of the data set. It appears whole or not at all."""
    tokenizer: Path
    """Hugging Face folder of the target model: tokenizer, chat template and config.json."""
    kind: Kind
    """Terms of the loss: sft (FuseSFT), pair (dpo, ln_dpo, simpo), rloo, wrpo; rank keeps every response, for eval."""
    overwrite: bool = False
    """Replace a data set at `output` that was built differently, or by a version that broke ties by the order of the
    file. An equal one is kept and nothing is done."""

    part: Literal["auto", "sft", "po", "eval", "train", "all"] = "auto"
    """Side of the split; train is sft and po. auto: sft for sft, po for pair, rloo and wrpo, eval for rank."""
    seed: int = 0
    """Seed of the split, of the order behind `max_prompts`, and of the order between equal rewards."""
    holdout: float = Field(0.0, ge=0, le=1)
    """Fraction of the prompts held out (part eval), by hash of prompt_id and seed."""
    sft_fraction: float = Field(0.4, ge=0, le=1)
    """Fraction of the prompts that are not held out and go to SFT; the rest goes to PO."""
    max_prompts: int | None = Field(None, ge=1)
    """Take only this many prompts of the part, the first by hash: a larger number is a superset. None: all."""
    domains: tuple[str, ...] = ()
    """Take only prompts of these domains. Empty: all."""
    include_sources: tuple[str, ...] = ()
    """Take only responses of these sources. Empty: all."""
    exclude_sources: tuple[str, ...] = ()
    """Leave out the responses of these sources."""
    responses_per_source: int | None = Field(None, ge=1)
    """Take only the first N responses of each source, in the order of the file, before anything else. None: all."""

    selection: Literal["auto", "top_k_all", "top1_per_source", "single_best", "per_source", "top1"] = "auto"
    """sft: top_k_all (auto), top1_per_source, single_best. pair, rloo: per_source (auto), top1 (SFT+PO baseline)."""
    k: int | None = Field(None, ge=1)
    """Responses (top_k_all: 4 where None) or sources (otherwise: all where None) kept a prompt, by highest reward."""
    alpha: float | None = Field(None, gt=0)
    """Temperature of the weights, in units of the reward. None: 1e-2 for sft, 5e-3 for pair and rloo. SimPO: 1e-3."""
    weighting: Literal["softmax", "uniform"] = "softmax"
    """softmax: Eq. 8 of FuseRL. uniform: all terms of a prompt weigh the same."""
    reward_field: str = Field("reward", min_length=1)
    """Key of a response that holds its reward."""
    min_gap: float | None = Field(None, ge=0)
    """Smallest reward gap of a pair, in units of the reward (FuseChat-3.0: 0.01). None: any but a tie."""
    max_gap: float | None = Field(None, ge=0)
    """Largest reward gap of a pair (FuseChat-3.0: 0.1). None: no bound."""
    use_correct: bool = False
    """Where responses are graded (`correct`): sft takes correct ones only, pair takes correct against incorrect."""
    target_source: str | None = None
    """wrpo: the source name of the target's own responses."""

    domain_rules: dict[str, DomainRule] = {}  # noqa: RUF012 - pydantic copies defaults
    """One table a domain ("*": every other one), instead of selection, gaps and use_correct: see fusechat3.toml. Where
    there is any, a domain without a rule is left out."""
    beside: Path | None = None
    """Another data set of the same input, for example the SFT one: its counts stand beside these in the table."""

    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """A line that is not a good record: stop, or set it aside in OUTPUT.quarantine.jsonl."""
    on_bad_response: Literal["refuse", "drop"] = "refuse"
    """A response with empty text or without a finite reward: a bad record, or leave the response out."""
    on_unfinished: Literal["drop", "no_end_of_turn"] = "drop"
    """A response with finish_reason "length": leave it out, or keep it without an end of turn."""

    max_length: int = Field(2048, ge=2)
    """Tokens of a prompt and one response, end of turn included."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Tokens of a prompt. None: max_length - 1."""
    on_long_prompt: Literal["drop"] = "drop"
    """A prompt above max_prompt_length is left out with all its responses."""
    on_long_response: Literal["drop", "truncate_end"] = "drop"
    """A response above max_length: leave it out, or cut its end, which then has no end of turn."""
    max_row_tokens: int | None = Field(None, ge=2)
    """Tokens of a prompt and all its kept responses; must fit one row of the training. None: no bound."""
    on_long_group: Literal["refuse", "drop"] = "refuse"
    """A group above max_row_tokens: stop with its number, or leave it out."""

    chat_template: Path | None = None
    """Jinja file that replaces the chat template of the folder."""
    template_kwargs: dict[str, bool | int | float | str] = {}  # noqa: RUF012 - pydantic copies defaults
    """Variables of the chat template, for example enable_thinking = false."""
    thinking: Literal["template", "in_answers"] = "template"
    """Who writes the think block of a target that thinks. template: the chat template, or nobody. in_answers: answers
    hold it (`</think>` must be there) and go behind the prompt as they are; one without is left out."""
    system_messages: Literal["template", "first_user_turn"] = "template"
    """first_user_turn: a system message becomes the beginning of the first user message, a blank line between, for
    templates that know no system role (Gemma 2)."""
    end_of_turn: str | None = None
    """Text that ends an answer. None: what the chat template writes, up to its first control token."""
    vocab_size: int | None = Field(None, ge=1)
    """Entries of the model's embedding. None: vocab_size of config.json."""

    @model_validator(mode="after")
    def _consistent(self) -> "BuildConfig":
        if self.selection != "auto" and self.selection not in SELECTIONS[self.kind]:
            known = ", ".join(SELECTIONS[self.kind]) or "auto only"
            raise ValueError(f"selection = {self.selection!r} is not one of kind {self.kind!r}: {known}")
        if (self.kind == "wrpo") != (self.target_source is not None):
            raise ValueError(f"target_source must be set for kind wrpo and for no other; kind is {self.kind!r}")
        if self.min_gap is not None and self.max_gap is not None and self.min_gap > self.max_gap:
            raise ValueError(f"min_gap = {self.min_gap} is above max_gap = {self.max_gap}")
        if self.kind != "pair" and (self.min_gap is not None or self.max_gap is not None):
            raise ValueError(f"min_gap and max_gap are for kind pair; kind is {self.kind!r}")
        if self.use_correct and self.kind not in ("sft", "pair"):
            raise ValueError(f"use_correct is for kinds sft and pair; kind is {self.kind!r}")
        if self.selection in ("single_best", "top1") and self.k not in (None, 1):
            raise ValueError(f"selection = {self.selection!r} keeps one: leave k = {self.k} out")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length = {self.max_prompt_length} must be below max_length = {self.max_length}"
            )
        self._check_rules()
        overlap = set(self.include_sources) & set(self.exclude_sources)
        if overlap:
            raise ValueError(f"sources both included and excluded: {', '.join(sorted(overlap))}")
        return self

    def _check_rules(self) -> None:
        """Refuse settings of the whole build that a table of a domain would silently replace."""
        if not self.domain_rules:
            return
        if self.kind not in ("sft", "pair", "rank"):
            raise ValueError(f"domain_rules are for kinds sft, pair and rank; kind is {self.kind!r}")
        given = {
            "selection": self.selection != "auto",
            "use_correct": self.use_correct,
            "min_gap": self.min_gap is not None,
            "max_gap": self.max_gap is not None,
        }
        if clash := [name for name, is_set in given.items() if is_set]:
            raise ValueError(f"{' and '.join(clash)} must be set in the tables of domain_rules, where there are any")

    def rule_of(self, domain: str) -> DomainRule | None:
        """The rule of a domain; None where there are no rules, or none for it."""
        return self.domain_rules.get(domain, self.domain_rules.get(EVERY_DOMAIN))

    @property
    def resolved_part(self) -> Literal["sft", "po", "eval", "train", "all"]:
        """The part, with auto resolved by kind."""
        return PART_OF_KIND[self.kind] if self.part == "auto" else self.part  # type: ignore[return-value]

    @property
    def resolved_alpha(self) -> float:
        """alpha, with None resolved to the papers' value for the kind."""
        return self.alpha if self.alpha is not None else ALPHA_OF_KIND.get(self.kind, 1.0)

    @property
    def resolved_k(self) -> int | None:
        """k, with None resolved by selection; None then means all sources."""
        if self.selection == "top1":
            return 1
        return 4 if self.k is None and self.kind == "sft" and self.selection in ("auto", "top_k_all") else self.k
