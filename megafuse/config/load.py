"""Configuration of one command: defaults < TOML files, left to right < flags; validated once, when all are merged.

    megafuse train base.toml overlay.toml --optim.lr 1e-5

A field that is itself a `Config` is a TOML table and a flag prefix (`[optim] lr = 1e-5`, `--optim.lr 1e-5`). A later
file replaces single fields, not whole tables. Fields that hold configs inside a container, or an optional config, can
be set in files only. TOML has no null: the string "none" sets a field that may be None.
"""

import difflib
import json
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from megafuse.config.base import Config
from megafuse.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ConfigT = TypeVar("ConfigT", bound=Config)

USAGE = (
    "Files come first: {prog} [FILE.toml ...] [options]. A later file overrides an earlier one, options override "
    "files, --print_config shows the result as TOML and stops."
)


def parse(cls: type[ConfigT], argv: Sequence[str], *, prog: str, description: str) -> ConfigT:
    """Read the leading `*.toml` arguments, then flags; return the validated configuration.

    `--help` shows the values of the files as defaults. `--print_config` prints the resolved configuration and exits.

    Raises ConfigError for everything that a file or a combination of values has wrong, SystemExit(2) for a flag that
    tyro refuses (it prints the nearest names), SystemExit(0) after `--help` and `--print_config`.
    """
    count = next((i for i, arg in enumerate(argv) if arg.startswith("-") or not arg.endswith(".toml")), len(argv))
    flags = [arg for arg in argv[count:] if arg not in ("--print_config", "--print-config")]
    _check_switches(cls, flags)
    values = tyro.cli(
        cls,
        prog=prog,
        description=f"{description}\n\n{USAGE.format(prog=prog)}",
        args=flags,
        default=_partial(cls, read_files(cls, argv[:count])),
        use_underscores=True,
        registry=_REGISTRY,
    )
    config = validate(cls, values)  # type: ignore[arg-type]  # the registry makes tyro return nested dicts
    if len(flags) < len(argv) - count:
        print(dump_toml(config), end="")
        raise SystemExit(0)
    return config


def load(cls: type[ConfigT], *paths: str | Path) -> ConfigT:
    """The configuration that files alone give, for example a run folder's `config.toml`. Raises ConfigError."""
    return validate(cls, read_files(cls, paths))


def validate(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """`cls` from nested dicts; pydantic's complaints become one ConfigError with a line for each."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaints(error))) from None


def read_files(cls: type[Config], paths: Sequence[str | Path]) -> dict[str, Any]:
    """Merge TOML files, left to right, into nested dicts of values that have the types of `cls`'s fields.

    Raises ConfigError that names the file, and the line and column of a syntax error, the dotted name and the nearest
    known name of an unknown field, or the value and the problem of a field of the wrong type.
    """
    merged = _section_defaults(cls)
    for path in paths:
        problems: list[str] = []
        values = _checked(cls, _read_toml(Path(path)), "", cls, problems)
        if problems:
            raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
        _merge(cls, merged, values)
    return merged


def dump_toml(config: Config) -> str:
    """TOML text that reads back as an equal configuration: floats bit by bit, None left out or "none"."""
    lines: list[str] = []
    _dump_table(config, "", lines)
    return "\n".join(lines).strip("\n") + "\n"


# ---- files


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}: TOML files are UTF-8") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
        if place:
            line, column = int(place[1]), int(place[2])
        else:  # "(at end of document)"
            line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        raise ConfigError(f"{path}:{line}:{column}: {re.sub(r' [(]at .*[)]$', '', message)}") from None


def _checked(
    cls: type[Config], table: Mapping[str, Any], prefix: str, root: type[Config], problems: list[str]
) -> dict[str, Any]:
    """The table with every leaf converted to its field's type; appends to `problems` what cannot be."""
    values: dict[str, Any] = {}
    for key, raw in table.items():
        name, field = prefix + key, cls.model_fields.get(key)
        section = _section(field.annotation) if field else None
        if field is None:
            problems.append(f"unknown field {name} = {_short(raw)}{_nearest(name, root)}")
        elif section and isinstance(raw, Mapping):
            values[key] = _checked(section, raw, f"{name}.", root, problems)
        elif section:
            problems.append(f"{name} = {_short(raw)} must be a table [{name}] with {', '.join(section.model_fields)}")
        elif raw == "none" and _allows_none(field.annotation):
            values[key] = None
        else:
            annotation: Any = Annotated[field.annotation, field]
            try:
                values[key] = TypeAdapter(annotation).validate_python(raw)
            except ValidationError as error:
                problems.extend(_complaints(error, name))
    return values


def _section_defaults(cls: type[Config], default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Nested dicts of every section's default values: a section's default may differ from its class's defaults."""
    values: dict[str, Any] = dict(default or {})
    for name, field in cls.model_fields.items():
        if section := _section(field.annotation):
            instance = values.get(name, {} if field.is_required() else field.get_default(call_default_factory=True))
            values[name] = _section_defaults(section, dict(instance))
    return values


def _merge(cls: type[Config], into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        section = _section(cls.model_fields[key].annotation)
        if section and key in into:
            _merge(section, into[key], value)
        else:
            into[key] = value


# ---- messages


def _check_switches(cls: type[Config], flags: Sequence[str]) -> None:
    """Raise ConfigError for a value behind a boolean's flag, which tyro would take for another argument."""
    switches = dict(_switches(cls))
    # a folder may be named 1, or on; nobody means one by "true"
    words = {"true", "false"} if _has_positional(cls) else {"true", "false", "yes", "no", "on", "off", "1", "0"}
    for flag, behind in zip(flags, [*flags[1:], ""]):
        name, equals, value = flag.partition("=")
        on_off = switches.get(name.replace("-", "_")) if name.startswith("--") else None
        if on_off and (equals or behind.lower() in words):
            on, off = on_off
            raise ConfigError(
                f"{name} {value if equals else behind}: this flag takes no value; fix: {on} for true, {off} for false"
            )


def _switches(cls: type[Config], prefix: str = "--") -> Iterator[tuple[str, tuple[str, str]]]:
    """(a flag with its dashes as underscores, (the flag for true, the one for false)) of every boolean."""
    for name, field in cls.model_fields.items():
        if section := _section(field.annotation):
            yield from _switches(section, f"{prefix}{name}.")
        elif field.annotation is bool:
            given = next((n for marker in field.metadata if (n := getattr(marker, "name", None))), name)
            pair = f"{prefix}{given}", f"{prefix}no_{given}"
            yield from ((flag.replace("-", "_"), pair) for flag in pair)


def _has_positional(cls: type[Config]) -> bool:
    return any(tyro.conf.Positional in field.metadata for field in cls.model_fields.values())


def _complaints(error: ValidationError, prefix: str = "") -> Iterator[str]:
    """One line for each pydantic error: dotted field, value, problem; no links, no Python class names."""
    for item in error.errors(include_url=False, include_context=False):
        name = ".".join(filter(None, [prefix, *map(str, item["loc"])]))
        problem = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if item["type"] == "missing" and any(isinstance(part, int) for part in item["loc"]):
            yield f"{name} is missing"
        elif item["type"] == "missing":
            yield f"{name} is required: set it in a file, or with --{name}"
        elif item["type"] == "too_short" and not item["input"]:
            yield f"no {name} given: at least one is needed; see --help"
        elif item["type"] == "extra_forbidden":
            yield f"unknown field {name} = {_short(item['input'])}"
        elif isinstance(item["input"], Mapping | Config):  # a validator of a whole table: it says what is wrong itself
            yield f"{name}: {problem}" if name else problem
        else:
            yield f"{name} = {_short(item['input'])}: {problem}"


def _nearest(name: str, root: type[Config]) -> str:
    """'; did you mean X?': a neighbour, else a field of another table, that looks like `name`; else the neighbours."""
    parent, _, last = name.replace("-", "_").rpartition(".")
    known = [(dotted, *dotted.rpartition(".")[::2]) for dotted in _dotted_names(root)]
    siblings = {field: dotted for dotted, table, field in known if table == parent}
    anywhere = {field: dotted for dotted, _, field in reversed(known)}  # the first of equal names wins
    for candidates in (siblings, anywhere, {} if parent else {dotted: dotted for dotted, _, _ in known}):
        for close in difflib.get_close_matches(last, candidates, n=1):
            return f"; did you mean {candidates[close]}?"
    return f"; {parent or 'the top level'} has {', '.join(siblings)}"


def _dotted_names(cls: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        if section := _section(field.annotation):
            yield from _dotted_names(section, f"{prefix}{name}.")


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, Path) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- types


def _section(annotation: Any) -> type[Config] | None:
    """The class, where a field is a plain nested config."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def _allows_none(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def _holds_config(annotation: Any) -> bool:
    return _section(annotation) is not None or any(_holds_config(arg) for arg in get_args(annotation))


# ---- tyro: flags are merged into nested dicts, so that validators see files and flags together, once

_REGISTRY = ConstructorRegistry()


def _partial(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """An instance without validation, which may lack required fields: tyro's defaults."""
    sections = {name: _section(field.annotation) for name, field in cls.model_fields.items()}
    filled = {name: _partial(section, v) if (section := sections[name]) else v for name, v in values.items()}
    return cls.model_construct(None, **filled)


@_REGISTRY.struct_rule
def _config_as_dict(info: StructTypeInfo) -> StructConstructorSpec | None:
    cls = _section(info.type)
    if cls is None:
        return None
    defaults = vars(info.default) if isinstance(info.default, Config) else {}
    hidden = {name: value for name, value in defaults.items() if _file_only(cls.model_fields[name])}
    fields = tuple(
        StructFieldSpec(name, _with_markers(field), defaults.get(name, tyro.MISSING), field.description)
        for name, field in cls.model_fields.items()
        if not _file_only(field)
    )
    return StructConstructorSpec(lambda **flags: {**hidden, **flags}, fields)


def _file_only(field: FieldInfo) -> bool:
    """Whether flags cannot express the field: configs in a container would become subcommands."""
    return _section(field.annotation) is None and _holds_config(field.annotation)


def _with_markers(field: FieldInfo) -> Any:
    """The annotation with its metadata, so that `tyro.conf` markers in a config class have their effect."""
    return Annotated[(field.annotation, *field.metadata, None)]  # None: Annotated wants one marker at least


# ---- writing


def _dump_table(config: Config, prefix: str, lines: list[str]) -> None:
    fields = type(config).model_fields
    plain = config.model_dump(mode="json")
    sections = [name for name, field in fields.items() if _section(field.annotation)]
    for name, field in fields.items():
        if name in sections:
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if plain[name] is not None or default is not None:
            lines.append(f"{name} = {_toml(plain[name])}")
    for name in sections:
        inner: list[str] = []
        _dump_table(getattr(config, name), f"{prefix}{name}.", inner)
        lines += ["", f"[{prefix}{name}]", *inner] if inner else []


def _toml(value: Any) -> str:
    """One TOML value on one line; dicts as inline tables."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # repr of a float is the shortest text that reads back as the same bits, and valid TOML
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON allows a raw DEL, TOML does not
    if isinstance(value, Mapping):
        pairs = (f"{_key(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    return "[" + ", ".join(_toml(item) for item in value) + "]"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
