"""`megafuse doctor parity`: layouts by name, what is refused, the table and the JSON."""

import json
from pathlib import Path

import pytest

from megafuse.cli.main import main
from megafuse.config.train import ParallelConfig
from megafuse.errors import ConfigError
from megafuse.parallel.layouts import layout_name, parse_layout, workable
from megafuse.testing.tiny import write_tiny_qwen3_moe


def test_layout_names_go_both_ways(tmp_path: Path) -> None:
    from megafuse.model.arch import read_arch

    arch = read_arch(write_tiny_qwen3_moe(tmp_path / "hf", seed=1))
    layouts = list(workable(arch, 4))
    assert len(layouts) > 20
    for parallel in layouts:
        for distributed in (True, False):
            assert parse_layout(layout_name(parallel, distributed)) == (parallel, distributed)
    assert layout_name(ParallelConfig()) == "dp"
    assert parse_layout("pp4-first3-last1") == (
        ParallelConfig(pipeline=4, first_stage_layers=3, last_stage_layers=1),
        False,
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tp2-xp3", "'xp3' is not understood; join dp, do, sp, tpN"),
        ("tp", "'tp' is not understood"),
        ("dp2", "'dp2' is not understood"),
        ("sp", "parallel.sequence = true needs parallel.tensor > 1"),
    ],
)
def test_a_layout_that_is_not_one_says_why(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_layout(text)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parity.json"
    words = ["doctor", "parity", "--losses", "sft", "ln_dpo", "--groups", "3", "--seed", "7", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "All 8 combinations" in shown and "ln_dpo" in shown
    found = json.loads(out.read_text())
    assert found["ok"] and found["tolerance"] == 1e-5 and len(found["cells"]) == 8
    assert all(0 < cell["gradient_difference"] < 1e-5 for cell in found["cells"])
    assert main([*words, "--tolerance", "1e-9"]) == 1
    assert "8 of 8 combinations are out of bounds" in capsys.readouterr().out


def test_the_command_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "parity", "--layouts", "tp2"]) == 2
    assert "world size 1 is not divisible" in capsys.readouterr().err
    assert main(["doctor", "parity", "--losses", "dpo2"]) == 2
    assert "losses names 'dpo2'; known: sft" in capsys.readouterr().err
