import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.curves import plot_run, run_figure, smooth
from megafuse.observe.metrics import MetricsLog


def records(steps: int, **more: Any) -> list[dict[str, Any]]:
    base = dict.fromkeys(("prompts", "tokens", "tokens_computed"), 1) | {"step_seconds": 1.0}
    speed = {"lr": 1e-6, "grad_norm": 2.0, "tokens_per_second": 5e4}
    return [base | speed | {"step": s, "loss": 1 / s} | more for s in range(1, steps + 1)]


def run_folder(path: Path, steps: int, **more: Any) -> Path:
    with MetricsLog(path, resume_step=0, tensorboard=False) as log:
        for record in records(steps, **more):
            log.log(record)
    return path


def panels(stages: list[tuple[str, list[dict[str, Any]]]]) -> list[dict[str, Axes]]:
    figure = run_figure(stages, "title")
    return [{axis.get_title(loc="left"): axis for axis in block.axes} for block in figure.subfigs]


def test_png_of_two_stages_without_touching_pyplot(tmp_path: Path) -> None:
    sft, po = run_folder(tmp_path / "sft", 40), run_folder(tmp_path / "po", 60, margin=0.1, accuracy=0.6)
    out = tmp_path / "new" / "curves.png"
    code = (
        "import sys; from megafuse.observe.curves import plot_run; sft, po, out = sys.argv[1:]\n"
        "plot_run([('FuseSFT', sft), ('FusePO', po)], out, 'both')\n"
        "import matplotlib; assert matplotlib.rcParams['axes.grid'] is False\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(sft), str(po), str(out)], check=True)
    image = imread(out)
    assert image.shape == (1080, 1800, 4) and [p.name for p in out.parent.iterdir()] == ["curves.png"]
    assert 0.005 < (image[..., :3] < 0.9).any(-1).mean() < 0.5  # something is drawn, on white


def test_curves_carry_the_numbers_and_missing_metrics_say_so() -> None:
    sft, po = panels([("FuseSFT", records(10)), ("FusePO", records(50, margin=0.25, reward_margin=9.0, accuracy=0.6))])
    assert list(sft) == list(po) and len(po) == 6
    (loss,) = sft["loss"].lines
    assert loss.get_xydata().tolist() == [[s, 1 / s] for s in range(1, 11)]
    assert [t.get_text() for t in sft["margin"].texts] == ["not reported"] and not sft["margin"].lines
    raw, mean = po["loss"].lines
    assert raw.get_ydata().tolist() == [1 / s for s in range(1, 51)]
    np.testing.assert_array_equal(mean.get_ydata(), smooth(raw.get_ydata(), 10))
    assert len(po["learning rate"].lines) == 1
    assert po["margin"].lines[0].get_ydata().tolist() == [0.25] * 50


def test_panels_that_no_stage_reports_are_left_out() -> None:
    (only,) = panels([("FuseSFT", records(5))])
    assert list(only) == ["loss", "gradient norm", "learning rate", "tokens per second"]
    (none,) = panels([("new", [])])
    assert none == {}
    (single,) = panels([("x", [{"step": 1, "loss": 1.0}])])
    assert list(single) == ["loss"]


def test_steps_that_were_not_finite_are_marked() -> None:
    rows = records(20)
    rows[6] |= {"loss": None, "nonfinite": ["loss"]}
    figure = run_figure([("x", rows)], "t")
    axis = next(a for a in figure.axes if a.get_title(loc="left") == "gradient norm")
    assert [list(line.get_xdata()) for line in axis.lines[1:]] == [[7, 7]]
    assert "1 not finite (red)" in figure.subfigs[0].get_suptitle()
    assert np.isnan(figure.axes[0].lines[0].get_ydata()[6])


def test_smooth_against_its_definition() -> None:
    rng = np.random.default_rng()
    values = rng.standard_normal(40)
    values[[0, 7, 8]] = np.nan
    keep = 1 - 2 / 11
    for i, mean in enumerate(smooth(values, 10)):
        terms = [(keep ** (i - j), v) for j, v in enumerate(values[: i + 1]) if not np.isnan(v)]
        if not terms:
            assert np.isnan(mean)
        else:
            assert mean == pytest.approx(sum(w * v for w, v in terms) / sum(w for w, _ in terms), rel=1e-12)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to draw"):
        plot_run([], tmp_path / "x.png", "t")
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl does not exist"):
        plot_run([("a", tmp_path)], tmp_path / "x.png", "t")
    assert not (tmp_path / "x.png").exists()
