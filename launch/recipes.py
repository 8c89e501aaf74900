"""The recipes: the sbatch scripts of slurm/, read for what they say themselves, so that nothing is said twice."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import megafuse
from megafuse.errors import ConfigError

_ASSIGNED = r"([A-Z_]+)=\$\{[A-Z_]+:-((?:[^{}$]|\$\{[^{}]*\})*)\}"
"""NAME=${NAME:-default}; the default may hold one such more."""


@dataclass(frozen=True)
class Recipe:
    """One sbatch script."""

    name: str
    script: Path
    options: dict[str, str | None]
    """Its #SBATCH lines: option -> value, None for a flag."""
    variables: dict[str, str]
    """Variable -> what the script's comment says of it."""
    read: frozenset[str] = frozenset()
    """Every variable that it or a script of the same folder reads."""

    @property
    def job_name(self) -> str:
        """Slurm's name of the job."""
        return self.options.get("job-name") or self.name

    @property
    def required(self) -> list[str]:
        """Variables without which the script refuses to begin."""
        return [name for name, text in self.variables.items() if "(required)" in text]

    def refuse_misspelled(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a name that nothing here reads, and that looks like one that is read."""
        for name in names:
            close = difflib.get_close_matches(name, self.read, n=1, cutoff=0.75)
            if name not in self.read and close:
                raise ConfigError(f"env: no script of recipe {self.name} reads {name}; did you mean {close[0]}?")


def repository() -> Path:
    """The checkout that has slurm/, where this package is imported from.

    Raises:
        ConfigError: the package was installed without it.
    """
    found = Path(megafuse.__file__).resolve().parent.parent
    for root in (found, Path.cwd()):
        if (root / "slurm" / "node.sh").is_file():
            return root
    raise ConfigError("no folder slurm/ beside the package or here: run `megafuse launch` in a clone of the repository")


def recipes(root: Path) -> dict[str, Path]:
    """Name -> script, of everything in slurm/ that sbatch takes."""
    scripts = sorted((root / "slurm").glob("*.sh"))
    return {path.stem: path for path in scripts if "\n#SBATCH " in path.read_text()}


def read_recipe(root: Path, name: str) -> Recipe:
    """A recipe by its name or path.

    Raises:
        ConfigError: there is none; says which there are.
    """
    known = recipes(root)
    path = known.get(name) or Path(name)
    if not path.is_file():
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise ConfigError(f"no recipe {name!r}: {hint}")
    text = path.read_text()
    options: dict[str, str | None] = {}
    for option, value in re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, re.MULTILINE):
        options[option] = value or None
    if not options:
        raise ConfigError(f"{path} has no #SBATCH lines: it is not for sbatch")
    shared = root / "slurm" / "stages.sh"
    variables = _variables(text)
    if shared.name in text and shared.is_file():
        variables = {**_variables(shared.read_text()), **variables}
    texts = [script.read_text() for script in {path, *(root / "slurm").glob("*.sh")}]
    read = frozenset(name for each in texts for name in re.findall(r"\$\{?([A-Z][A-Z_0-9]*)", each))
    return Recipe(path.stem, path.resolve(), options, _not_twice(variables), read)


def _not_twice(variables: dict[str, str]) -> dict[str, str]:
    """Without a variable that a line for several ("TP PP") names too."""
    grouped = {name for names in variables if " " in names for name in names.split()}
    return {name: text for name, text in variables.items() if name not in grouped}


def _variables(text: str) -> dict[str, str]:
    """The script's variables: what its opening comment lists, and its own assignments with a default.

    `#   TP PP  tensor- and pipeline-parallel ranks` -> {"TP PP": "tensor- and ..."}; `TP=${TP:-4} # ranks` the same.
    """
    found = dict(re.findall(r"^#   ([A-Z][A-Z_ ]*[A-Z]|[A-Z]+)  +(\S.*)", text, re.MULTILINE))
    listed = {name for names in found for name in names.split()} | {"MEGAFUSE_ROOT"}
    for line in text.splitlines():
        assigned = re.match(rf"(?:export )?((?:{_ASSIGNED} *)+)(?:# *(.*))?$", line)
        given = re.findall(_ASSIGNED, assigned[1]) if assigned else []
        names, defaults = [name for name, _ in given], [default or "none" for _, default in given]
        if assigned and not listed & set(names):
            comment = f"{assigned[4]}; " if assigned[4] else ""
            found[" ".join(names)] = f"{comment}default {' and '.join(defaults)}"
    for name, comment in re.findall(r"\$\{([A-Z_]+):\?([^}]*)\}", text):
        if name not in listed and not name.startswith("SLURM_"):
            found[name] = f"{comment} (required)"
    return found
