"""Files, flags and messages of megafuse.config.load."""

import math
import random
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from megafuse.cli.main import COMMANDS, _load
from megafuse.config.base import Config
from megafuse.config.load import dump_toml, load, parse, read_files
from megafuse.errors import ConfigError


class Adam(Config):
    """Inner section."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate (1/step)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Moments."""
    clip: float | None = 1.0
    """Limit; None switches it off."""


class Layout(Config):
    """Another section, with a rule over two fields."""

    tensor: int = Field(1, ge=1)
    """Ranks."""
    sequence: bool = False
    """Split norms."""

    @model_validator(mode="after")
    def _rule(self) -> "Layout":
        if self.sequence and self.tensor == 1:
            raise ValueError("layout.sequence = true needs layout.tensor > 1, got 1")
        return self


class Source(Config):
    """An item of a list: files only."""

    name: str
    """Name."""
    share: float = 1.0
    """Share."""


class Run(Config):
    """A run."""

    data: Path
    """Data set folder."""
    optim: Adam = Adam(lr=2e-5)
    layout: Layout = Layout()
    kind: Literal["sft", "pair"] = "sft"
    """Kind of loss."""
    name: str = "x"
    """Name."""
    steps: int | None = None
    """Steps."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Per source."""
    sources: list[Source] = Field(default_factory=list)
    """Sources."""
    other: Layout | None = None
    """An optional section: files only."""


def write(folder: Path, text: str, name: str = "run.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(*argv: str) -> Run:
    return parse(Run, list(argv), prog="megafuse x", description="Does x.")


def test_defaults_files_and_flags_in_that_order(tmp_path: Path) -> None:
    base = write(tmp_path, 'data = "a"\nname = "base"\n[optim]\nlr = 1e-4\nbetas = [0.8, 0.9]\n')
    over = write(tmp_path, 'name = "over"\n[optim]\nweight_decay = 0.5\n', "over.toml")
    config = run(base, over, "--optim.lr", "3e-6", "--layout.tensor", "2")
    assert config.data == Path("a") and config.name == "over"
    assert config.optim == Adam(lr=3e-6, weight_decay=0.5, betas=(0.8, 0.9))
    assert config.layout.tensor == 2


def test_a_section_default_wins_over_its_class_default(tmp_path: Path) -> None:
    assert run("--data", "a").optim.lr == 2e-5
    path = write(tmp_path, 'data = "a"\n[optim]\nclip = 2\n')
    assert run(path).optim == load(Run, path).optim == Adam(lr=2e-5, clip=2.0)


def test_flags_repair_a_combination_that_the_file_alone_forbids(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = "a"\n[layout]\nsequence = true\n')
    with pytest.raises(ConfigError, match=r"^layout: layout\.sequence = true needs layout\.tensor > 1, got 1$"):
        run(path)
    assert run(path, "--layout.tensor", "2").layout.sequence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1e-5", "unknown field optim.lrr = 1e-05; did you mean optim.lr?"),
        ("lr = 1e-5", "unknown field lr = 1e-05; did you mean optim.lr?"),
        ("[optim]\nweight-decay = 1", "unknown field optim.weight-decay = 1; did you mean optim.weight_decay?"),
        ("[optmi]\nlr = 1", "unknown field optmi = {'lr': 1}; did you mean optim?"),
        ("[layout]\nzzz = 1", "unknown field layout.zzz = 1; layout has tensor, sequence"),
        ("optim = 3", "optim = 3 must be a table [optim] with lr, weight_decay, betas, clip"),
        (
            "[optim]\nlr = 'fast'",
            "optim.lr = 'fast': Input should be a valid number, unable to parse string as a number",
        ),
        ("[optim]\nlr = -1.0", "optim.lr = -1.0: Input should be greater than 0"),
        ("[optim]\nbetas = [1.0]", "optim.betas.1 is missing"),
        ("kind = 'other'", "kind = 'other': Input should be 'sft' or 'pair'"),
        ("[[sources]]\nnam = 'q'", "unknown field sources.0.nam = 'q'"),
    ],
)
def test_a_wrong_file_names_field_value_and_fix(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        run(path, "--data", "a")
    lines = str(caught.value).splitlines()
    assert f"{path}: {message}" in lines
    assert "pydantic" not in str(caught.value)


def test_every_problem_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "nmae = 1\n[optim]\nlr = 0\n")
    with pytest.raises(ConfigError) as caught:
        run(path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "place"),
    [("a = 1\nb = = 2\n", "2:5"), ("x = [1,\n2\n", "3:1"), ('x = "abc', "1:9"), ("a = 1\na = 2\n", "2:6")],
)
def test_syntax_errors_have_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        run(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{place.split(':')[0]}:"), message
    assert message.startswith(f"{path}:{place}: "), message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read .* No such file"):
        run(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 8"):
        run(str(tmp_path / "latin.toml"))


def test_missing_required_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    assert "--data" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^data is required: set it in a file, or with --data$"):
        load(Run, write(tmp_path, "name = 'x'"))


def test_flag_typos_keep_tyros_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--data", "a", "--optim.weight_decya", "1")
    assert "--optim.weight_decay" in capsys.readouterr().err


def test_a_flag_out_of_range_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lr = -1\.0: Input should be greater than 0$"):
        run("--data", "a", "--optim.lr", "-1")


def test_help_shows_docstrings_units_and_the_files_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 'data = "some/where"\n[optim]\nlr = 0.125\n')
    with pytest.raises(SystemExit) as caught:
        run(path, "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "Peak learning rate (1/step). (default: 0.125)" in text
    assert "Data set folder. (default: some/where)" in text
    assert "--layout.sequence, --layout.no_sequence" in text and "Does x." in text and "FILE.toml" in text


def test_no_warning_on_any_default(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    text = 'data = "a"\nsteps = 3\n[weights]\nq = 1\n[optim]\nbetas = [1, 0]\nclip = "none"\n[[sources]]\nname = "q"\n'
    config = run(write(tmp_path, text))
    assert config.optim.clip is None and config.optim.betas == (1.0, 0.0)
    assert config.sources == [Source(name="q")] and config.weights == {"q": 1.0}
    assert [str(w.message) for w in recwarn.list] == []


def test_an_optional_section_is_set_in_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", "a").other is None
    config = run(write(tmp_path, 'data = "a"\n[other]\ntensor = 3\n'), "--layout.tensor", "2")
    assert config.other == Layout(tensor=3)
    assert load(Run, write(tmp_path, dump_toml(config))) == config
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "subcommands" not in text and "--other.tensor" not in text


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    rng = random.Random(7)
    alphabet = string.printable + '\x7f\x00\xe9\u4e2d\U0001f600"\\'
    for _ in range(50):
        texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(9))) for _ in range(4)]
        config = Run(
            data=Path("a b"),
            name=texts[0],
            steps=rng.choice([None, 3]),
            optim=Adam(
                lr=math.ldexp(rng.random() + 0.1, rng.randrange(-900, 50)),
                weight_decay=rng.choice([1e17, 0.1]),
                clip=rng.choice([None, 0.5]),
            ),
            layout=Layout(tensor=2, sequence=rng.random() < 0.5),
            weights={texts[1]: rng.random(), texts[2]: -0.0},
            sources=[Source(name=texts[3])],
        )
        path = write(tmp_path, dump_toml(config))
        assert load(Run, path) == run(path) == config
        assert run(path).optim.lr.hex() == config.optim.lr.hex()


def test_none_is_left_out_where_it_is_the_default() -> None:
    text = dump_toml(Run(data=Path("a"), optim=Adam(clip=None)))
    assert "steps" not in text and 'clip = "none"' in text


def test_print_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(write(tmp_path, 'data = "a"\n'), "--optim.lr", "0.5", "--print-config")
    assert caught.value.code == 0
    path = write(tmp_path, capsys.readouterr().out, "printed.toml")
    assert load(Run, path) == run("--data", "a", "--optim.lr", "0.5")


def test_read_files_does_not_invent_required_fields(tmp_path: Path) -> None:
    assert "data" not in read_files(Run, [write(tmp_path, "name = 'q'")])


def booleans(config: type[Config], prefix: str = "--") -> Iterator[str]:
    """Every flag of a boolean that a command's --help can show, without the dashes in front."""
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from booleans(field.annotation, f"{prefix}{name}.")
        elif field.annotation is bool:
            yield prefix + {"as_json": "json"}.get(name, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_boolean_with_a_value_names_the_flags_for_both(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, _, description = _load(command, COMMANDS[command])
    names = list(booleans(config))
    assert names or command not in ("train", "build", "convert import", "doctor")
    with pytest.raises(SystemExit):
        parse(config, ["--help"], prog=command, description=description)
    shown = capsys.readouterr().out
    for name in names:
        table, _, field = name.removeprefix("--").rpartition(".")
        off = f"--{table}.no_{field}" if table else f"--no_{field}"
        assert {name, off} <= set(re.findall(r"--[\w.]+", shown))
        for flag in (name, off, off.replace("_", "-")):
            for words in ([flag, "false"], [flag, "True"], [f"{flag}=false"], [f"{flag}=0"], ["x", flag, "FALSE", "y"]):
                with pytest.raises(ConfigError, match=re.escape(f"{name} for true, {off} for false")):
                    parse(config, words, prog=command, description=description)


def test_booleans_without_a_value_are_as_they_were(tmp_path: Path) -> None:
    config, _, _ = _load("convert import", COMMANDS["convert import"])

    def flags(*words: str) -> tuple[bool, str, str]:
        made = parse(config, words, prog="p", description="d")
        return made.overwrite, str(made.hf_dir), str(made.out)

    assert flags("--overwrite", "1", "0") == (True, "1", "0")  # folders of these names
    assert flags("a", "true", "--no-overwrite") == (False, "a", "true")
    assert parse(Run, ["--data", "true", "--layout.tensor", "2", "--layout.sequence"], prog="p", description="d").layout
    with pytest.raises(ConfigError, match=r"--layout\.no_sequence for false"):
        parse(Run, ["--layout.sequence", "off", "--data", "x"], prog="p", description="d")
