"""What a cache of reference log-probs depends on, part by part, so that a mismatch can name its part."""

from pathlib import Path
from typing import Any

from megafuse.converters.digest import weights_digest
from megafuse.errors import IntegrityError

PARTS = {
    "weights": "the reference model's weights",
    "tokenizer": "the tokenizer that the data set was built with",
    "template": "the chat template that the data set was built with",
    "data": "the data set (prompts, responses, or their order)",
    "settings": "the log-prob settings (precision, temperature)",
}


def settings_text(precision: str) -> str:
    """The log-prob settings as a short text: part of the key, readable in the manifest."""
    return f"sum of response tokens, temperature 1.0, {precision}"


def settings_precision(settings: str) -> str | None:
    """The precision in a `settings_text`; None where there is none, as in a cache that this version does not read."""
    precision = settings.rpartition(", ")[2]
    return precision if precision in ("bf16", "fp32") else None


def reference_digest(checkpoint: Path, data_manifest: dict[str, Any], *, precision: str) -> dict[str, str]:
    """The key of the reference log-probs of `checkpoint` on a data set. Layout-independent."""
    return {
        "weights": weights_digest(checkpoint),
        **{part: data_manifest["digest"][part] for part in ("tokenizer", "template", "data")},
        "settings": settings_text(precision),
    }


ANOTHER = "write a new one with `megafuse reference`, or leave reference.path empty to compute it in the run"


def require_match(expected: dict[str, str], found: dict[str, str], where: Path, *, advice: str = ANOTHER) -> None:
    """Refuse a cache that was made from something else.

    Raises:
        IntegrityError: listing every part that differs, with both values, and `advice`.
    """
    wrong = [part for part in PARTS if expected[part] != found.get(part)]
    if wrong:
        lines = [f"  {part}: {PARTS[part]}: cache {found.get(part)!r}, this run {expected[part]!r}" for part in wrong]
        precision = settings_precision(found.get("settings", ""))
        if wrong == ["settings"] and precision:
            advice = f"set model.precision = {precision!r} to use it, or {advice}"
        told = [f"reference cache {where} does not belong to this run; these parts differ:", *lines, advice]
        raise IntegrityError("\n".join(told))
