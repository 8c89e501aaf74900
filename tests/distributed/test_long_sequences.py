"""A data set with sequences beyond the positions that the model claims: every pass over it says so once."""

import json
import os
from pathlib import Path

import pytest

from megafuse.config.forward import ReferenceRunConfig
from megafuse.config.train import DataConfig, ModelConfig
from megafuse.model.arch import read_arch
from megafuse.parallel.cpu_runtime import compile_when_called
from megafuse.reference.run import run_reference
from megafuse.testing.parity import Lab
from megafuse.training.run import train

pytestmark = pytest.mark.distributed


def test_training_and_forward_passes_warn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path, int.from_bytes(os.urandom(4), "little")).prepare()
    run = lab.config("dpo", "run", max_steps=1)
    model, data = run.model.path, run.data.dataset
    claimed = read_arch(model).max_position_embeddings
    manifest = json.loads((data / "manifest.json").read_text())

    def passes(longest: int | None, name: str) -> list[str]:
        """stderr of a training run and of a reference pass."""
        told = {} if longest is None else {"max_sequence_tokens": longest}
        (data / "manifest.json").write_text(json.dumps({**manifest, **told}))
        capsys.readouterr()
        with compile_when_called():
            train(lab.config("dpo", name, max_steps=1))
            found = [capsys.readouterr().err]
            forward = ReferenceRunConfig(
                out=tmp_path / f"ref-{name}",
                model=ModelConfig(path=model, precision="fp32"),
                data=DataConfig(dataset=data, max_row_tokens=256),
            )
            run_reference(forward, forward.out, "ref")
        return [*found, capsys.readouterr().err]

    for error in passes(claimed + 1, "beyond"):
        says = f"a sequence of {claimed + 1} tokens, the model's max_position_embeddings is {claimed}"
        assert error.count(says) == 1 and str(data) in error
    manifest.pop("max_sequence_tokens", None)
    for longest in (claimed, None):
        assert not any("max_position_embeddings" in error for error in passes(longest, f"within-{longest}"))
