"""What a cache of reference log-probs depends on, part by part, so that a mismatch can name its part."""

import contextlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megafuse.converters.digest import weights_digest
from megafuse.errors import IntegrityError
from megafuse.model.arch import NOT_IN_NUMBERS, ModelArch, read_arch

ARCHITECTURE = "architecture"
PARTS = {
    "weights": "the reference model's weights",
    ARCHITECTURE: "the reference model's configuration",
    "tokenizer": "the tokenizer that the data set was built with",
    "template": "the chat template that the data set was built with",
    "data": "the data set (prompts, responses, or their order)",
    "settings": "the log-prob settings (precision, temperature)",
}


def architecture_text(arch: ModelArch) -> str:
    """What of `arch` changes numbers, as JSON: {field: value}. Fields at their default are left out, so that a field
    that a later version adds changes no key."""
    plain = json.loads(json.dumps(asdict(arch)))
    default = {f.name: f.default for f in fields(arch)}
    kept = {name: value for name, value in plain.items() if getattr(arch, name) != default[name]}
    return json.dumps({name: value for name, value in kept.items() if name not in NOT_IN_NUMBERS}, sort_keys=True)


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
        ARCHITECTURE: architecture_text(read_arch(checkpoint)),
        **{part: data_manifest["digest"][part] for part in ("tokenizer", "template", "data")},
        "settings": settings_text(precision),
    }


ANOTHER = "write a new one with `megafuse reference`, or leave reference.path empty to compute it in the run"


def require_match(expected: dict[str, str], found: dict[str, str], where: Path, *, advice: str = ANOTHER) -> None:
    """Refuse a cache that was made from something else.

    One that does not say its architecture is believed: an earlier version wrote it, whose `megafuse reference` computed
    under the model's own configuration, too. (What a run computed itself, of a reference of another architecture than
    its policy's, is refused by `training.start`.)

    Raises:
        IntegrityError: listing every part that differs, with both values, and `advice`.
    """
    found = {ARCHITECTURE: expected[ARCHITECTURE], **found}
    wrong = [part for part in PARTS if expected[part] != found.get(part)]
    if wrong:
        lines = [f"  {part}: {PARTS[part]}: {_values(part, found.get(part), expected[part])}" for part in wrong]
        precision = settings_precision(found.get("settings", ""))
        if wrong == ["settings"] and precision:
            advice = f"set model.precision = {precision!r} to use it, or {advice}"
        told = [f"reference cache {where} does not belong to this run; these parts differ:", *lines, advice]
        raise IntegrityError("\n".join(told))


def _values(part: str, found: str | None, expected: str) -> str:
    """Both values; of architectures the fields that differ."""
    if part == ARCHITECTURE and found is not None:
        with contextlib.suppress(ValueError, AttributeError):
            old, new = json.loads(found), json.loads(expected)
            differ = sorted(name for name in old | new if old.get(name) != new.get(name))
            found, expected = (", ".join(f"{n} = {of.get(n)!r}" for n in differ) for of in (old, new))
            return f"cache {found}, this run {expected}"
    return f"cache {found!r}, this run {expected!r}"
