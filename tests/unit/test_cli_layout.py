"""`megafuse doctor layout`: what is refused, and the memory of a rank."""

import re
from pathlib import Path

import pytest

from megafuse.cli.main import main
from megafuse.testing.tiny import write_tiny_llama


def gib(out: str) -> float:
    return float(re.search(r"about ([\d.]+) GiB a rank", out)[1])  # type: ignore[index]


def test_a_70b_model_on_four_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "layout", "--model", "llama-3.1-70b", "--parallel.tensor", "8", "--parallel.sequence"]
    assert main([*words, "--ranks", "32", "--parallel.pipeline", "4"]) == 0
    out = capsys.readouterr().out
    # 70,553,706,496 parameters (the published model's); 2 + 4 bytes everywhere, 12 shared by the copies: 1 of them
    assert "70,553,706,496 parameters on 32 rank(s)" in out and "; 1 copies" in out
    assert gib(out) == pytest.approx(70_553_706_496 / 32 * 18 / 2**30, abs=0.05)
    assert main([*words, "--ranks", "64", "--parallel.pipeline", "4"]) == 0
    assert gib(capsys.readouterr().out) == pytest.approx(70_553_706_496 / 32 * 12 / 2**30, abs=0.05)


def test_what_cannot_be_cut_is_refused_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_tiny_llama(tmp_path / "hf", seed=0, layers=4))
    assert main(["doctor", "layout", "--model", folder, "--ranks", "4", "--parallel.tensor", "4"]) == 2
    told = capsys.readouterr().err
    assert "attention heads = 6 is not divisible by parallel.tensor = 4" in told and "nearest layout" in told
    assert main(["doctor", "layout", "--model", folder, "--ranks", "3", "--parallel.tensor", "2"]) == 2
    assert "world size 3 is not divisible" in capsys.readouterr().err
    assert main(["doctor", "layout", "--model", "llama-3.1-70bb", "--ranks", "8"]) == 2
    assert "did you mean llama-3.1-70b?" in capsys.readouterr().err
