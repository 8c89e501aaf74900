"""docs/slurm.md says of every Slurm script which variables it has, with the defaults that its block at the top has."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCED = {"stages.sh", "two_stages.sh", "fusechat3.sh"}
OWN_WAY = {"node.sh", *SOURCED}  # started by the scripts, not by people


def variables(path: Path) -> dict[str, str | None]:
    """Variable -> default of a script's block, or of stages.sh's; None where it must be set."""
    text = path.read_text()
    text = re.split(r"# shellcheck source=|unset SLURM_EXPORT_ENV", text)[0]
    found: dict[str, str | None] = dict.fromkeys(re.findall(r'^: "\$\{(\w+):\?set \1 to ', text, re.M))
    for name, default in re.findall(r"(?<!\S)(\w+)=\$\{\1:-((?:\$\{[^}]*\}|[^}])*)\}", text):
        found[name] = default
    found.pop("MEGAFUSE_ROOT", None)  # the same in all of them
    return found


def shown(found: dict[str, str | None]) -> str:
    """A cell of the table: `**MODEL** TP=4 BUILD`; a default that is asked of Slurm is not written."""
    words = []
    for name, default in found.items():
        plain = default if default and "$" not in default else ""
        words.append(f"**{name}**" if default is None else f"{name}={plain}" if plain else name)
    return " ".join(words)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    text = (ROOT / "docs" / "slurm.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_every_script_and_every_variable() -> None:
    scripts = {path.name: path for path in sorted((ROOT / "slurm").glob("*.sh")) if path.name not in OWN_WAY}
    table = {name.strip("`"): cell for name, _, cell in rows("Scripts")}
    assert table == {name: shown(variables(path)) for name, path in scripts.items()}
    assert [name.strip("`") for name, _, _ in rows("Scripts")] == list(table)
    shared = {name.strip("`"): cell.strip("`") for name, cell, _ in rows("What every job knows")}
    wanted = {name: "" if "$" in (d or "") else d for name, d in variables(ROOT / "slurm" / "stages.sh").items()}
    assert {name: default for name, default in shared.items() if name != "MEGAFUSE_ROOT"} == wanted


def test_every_variable_is_explained() -> None:
    named = {name for _, _, cell in rows("Scripts") for name in re.findall(r"[A-Z_]{2,}", re.sub(r"=\S+", "", cell))}
    told = {n for cell, _ in rows("Their variables") for n in re.findall(r"`([A-Z_]+)`", cell)}
    told |= {name.strip("`") for name, _, _ in rows("What every job knows")}
    assert named <= told and told <= named | set(variables(ROOT / "slurm" / "stages.sh")) | {"MEGAFUSE_ROOT"}


def test_every_variable_that_a_script_reads_is_in_a_block() -> None:
    """No knob is read from the environment (`${X:-...}`) without a line at the top that has its default."""
    common = {*variables(ROOT / "slurm" / "stages.sh"), "MEGAFUSE_ROOT"}
    for path in sorted((ROOT / "slurm").glob("*.sh")):
        if path.name in OWN_WAY:
            continue
        own = variables(path)
        used = {name for name in re.findall(r"\$\{([A-Z][A-Z_]+):-", path.read_text()) if not name.startswith("SLURM_")}
        assert used <= {*own, *common}, path.name
