"""Families of models, one small file each: the table of its tensors and what its config.json may say."""

from megafuse.converters.family import Family
from megafuse.converters.maps import gemma2, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from megafuse.converters.table import Arch
from megafuse.errors import ConfigError, UnsupportedModelError

_MAPS = (llama, qwen2, qwen3, qwen3_moe, mistral, mixtral, gemma2)
FAMILIES: dict[str, Family] = {family.TABLE.name: family.RULES for family in _MAPS}
_TABLES: dict[str, Arch] = {family.TABLE.name: family.TABLE for family in _MAPS}


def register(arch: Arch) -> Arch:
    """Make `arch` known under its HF class name. Raises ConfigError when that name is taken by another table."""
    if _TABLES.setdefault(arch.name, arch) != arch:
        raise ConfigError(f"architecture {arch.name!r} is registered already, with other rows; choose another name")
    return arch


def find(name: str) -> Arch:
    """The table of an HF class name. Raises UnsupportedModelError, naming the known ones."""
    if name not in _TABLES:
        raise UnsupportedModelError(f"architecture {name!r} has no conversion table; known: {sorted(_TABLES)}")
    return _TABLES[name]
