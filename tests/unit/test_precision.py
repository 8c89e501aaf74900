"""`model.precision = "auto"`: what each device computes natively, one answer for all ranks, kept for the run's life."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megafuse.cli.eval import run as evaluate
from megafuse.config.drift import began_precision
from megafuse.config.forward import EvalConfig, ReferenceRunConfig
from megafuse.config.load import dump_toml
from megafuse.config.sample import SampleConfig
from megafuse.config.score import ScoreConfig
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.data import chunks
from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.manifest import read_json, write_json_atomic
from megafuse.parallel import precision
from megafuse.parallel.precision import BEGAN, Bf16, bf16_of, product_seconds, settle_precision
from megafuse.reference import cache
from megafuse.reference.run import run_reference
from megafuse.rewards import score
from megafuse.sampling import sample
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training.run import bound_by, train

CPU = torch.device("cpu")
# the interesting part of /proc/cpuinfo
MACHINES = {
    "AMD EPYC 7003 (Zen 3)": ("flags\t\t: fpu sse4_2 avx avx2 fma bmi2 vaes", "fp32"),
    "Intel Skylake-SP": ("flags\t\t: fpu avx2 avx512f avx512dq avx512bw avx512vl", "fp32"),
    "AMD EPYC 9004 (Zen 4)": ("flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni", "bf16"),
    "Intel Sapphire Rapids": ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", "bf16"),
    "AWS Graviton 3": ("Features\t: fp asimd sve i8mm bf16 dgh", "bf16"),
    "AWS Graviton 2": ("Features\t: fp asimd evtstrm aes crc32 asimddp", "fp32"),
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this process believe in a CPU of MACHINES."""

    def become(name: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{MACHINES[name][0]}\nprocessor\t: 1\n{MACHINES[name][0]}\n")
        monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")

    return become


class Ranks:
    """The collectives of a world whose other ranks report `others`."""

    device = CPU

    def __init__(self, *others: Bf16) -> None:
        self.others = others

    def gather_on_rank_zero(self, value: Bf16) -> list[Bf16]:
        return [value, *self.others]

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        return function()


def settle(wanted: str, *others: Bf16, began: str | None = None) -> tuple[str, str]:
    world: Any = Ranks(*others)
    return settle_precision(wanted, world, lambda: None if began is None else (began, "what it began with"))


@pytest.mark.parametrize("name", MACHINES)
def test_auto_is_what_the_cpu_computes(name: str, machine: Callable[[str], None]) -> None:
    machine(name)
    found, reason = settle("auto")
    assert found == MACHINES[name][1]
    assert ("emulates bf16" in reason) == (found == "fp32")


def test_without_readable_flags_a_product_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, "processor : 0\n"):
        path = tmp_path / f"{text is None}"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(precision, "CPUINFO", path)
        for slower, native in ((3.0, False), (0.5, True)):
            times = {torch.float32: 1.0, torch.bfloat16: slower}
            monkeypatch.setattr(precision, "product_seconds", times.__getitem__)
            found = bf16_of(CPU)
            assert found.native == native and f"{slower:.2g} times as long" in found.reason


class Products(TorchDispatchMode):
    """Counts matrix products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen[args[0].dtype] += 1
        return func(*args, **(kwargs or {}))


def test_products_of_the_dtype_are_timed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with Products() as products:
            assert product_seconds(dtype, size=16, seconds=0) > 0
        assert products.seen == {dtype: 2}  # the first one warms up


@pytest.mark.parametrize(
    ("capability", "hip", "native"),
    [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((7, 5), "6.4", True)],
)
def test_cuda_by_its_capability(
    capability: tuple[int, int],
    hip: str | None,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[[str], None],
) -> None:
    machine("AMD EPYC 7003 (Zen 3)")  # the CPU beside the GPU has no say
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = bf16_of(torch.device("cuda", 0))
    assert found.native == native and "a GPU" in found.reason


def test_one_rank_that_emulates_decides_for_all(machine: Callable[[str], None]) -> None:
    machine("Intel Sapphire Rapids")
    old = Bf16(False, "this CPU emulates bf16")
    assert settle("auto", Bf16(True, "so does this"))[0] == "bf16"
    assert settle("auto", Bf16(True, "so does this"), old) == ("fp32", old.reason)


def test_the_other_ranks_take_what_rank_zero_says(machine: Callable[[str], None]) -> None:
    class Other(Ranks):
        def gather_on_rank_zero(self, value: Bf16) -> None:  # type: ignore[override]
            return None

        def on_rank_zero(self, function: Callable[[], Any]) -> Any:
            return "fp32", "what rank 0 has found"

    machine("Intel Sapphire Rapids")  # this rank alone would take bf16
    other: Any = Other()
    assert settle_precision("auto", other) == ("fp32", "what rank 0 has found")


def test_what_is_asked_for_is_taken(machine: Callable[[str], None]) -> None:
    machine("AMD EPYC 7003 (Zen 3)")
    found, reason = settle("bf16")
    assert found == "bf16" and "as asked for, though this CPU emulates bf16" in reason and "fp32 is faster" in reason
    assert settle("fp32", began="bf16") == ("fp32", "")
    machine("AMD EPYC 9004 (Zen 4)")
    assert settle("bf16") == ("bf16", "")
    assert settle("bf16", Bf16(False, "an old one"))[1] == "as asked for, though an old one: fp32 is faster"


def test_the_default_is_auto() -> None:
    assert TrainConfig.model_fields["model"].annotation.model_fields["precision"].default == "auto"  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("auto")
    import_hf(write_tiny_llama(root / "hf", seed=3, layers=1), root / "model")
    write_tiny_dataset(root / "pair", "pair", seed=4, groups=8)
    return root


def test_a_run_keeps_what_it_began_with(
    inputs: Path, tmp_path: Path, machine: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def run(steps: int, **model: Any) -> str:
        train(
            tiny_run(
                tmp_path / "run",
                inputs / "model",
                inputs / "pair",
                model={"precision": "auto", **model},
                loss={"name": "dpo", "beta": 0.3},
                epochs=2,
                checkpoint={"interval": 1},
                max_steps=steps,
                allow_change=("max_steps",),
            )
        )
        return capfd.readouterr().err

    machine("AMD EPYC 7003 (Zen 3)")
    assert ", fp32 (this CPU emulates bf16" in run(1)
    assert began_precision(tmp_path / "run") == "fp32"
    # the reference log-probs of the run are keyed by what it was resolved to
    assert cache.began_precision(tmp_path / "run" / "reference") == "fp32"
    machine("AMD EPYC 9004 (Zen 4)")  # goes on elsewhere
    assert ", fp32 (what it began with; here this CPU has avx512_bf16" in run(2)
    with pytest.raises(ConfigError, match=r"model\.precision: began with 'fp32', now 'bf16'"):
        run(2, precision="bf16")
    assert 'precision = "fp32"' in (tmp_path / "run" / "config.toml").read_text()


def test_a_reference_cache_keeps_it_too_and_says_what_fits(
    inputs: Path, tmp_path: Path, machine: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def reference() -> str:
        values = {"out": tmp_path / "ref", "model": {"path": inputs / "model"}, "data": {"dataset": inputs / "pair"}}
        run_reference(ReferenceRunConfig.model_validate(values), tmp_path / "ref", "ref")
        return capfd.readouterr().err

    machine("AMD EPYC 9004 (Zen 4)")
    assert ", bf16 (this CPU has avx512_bf16)" in reference()
    machine("AMD EPYC 7003 (Zen 3)")
    assert ", bf16 (what it began with" in reference()

    def config(name: str, model: dict[str, Any]) -> TrainConfig:
        return tiny_run(
            tmp_path / name,
            inputs / "model",
            inputs / "pair",
            model={"precision": "auto", **model},
            loss={"name": "dpo", "beta": 0.3},
            reference={"path": tmp_path / "ref"},
            max_steps=1,
        )

    def run(name: str, **model: Any) -> str:
        train(config(name, model))
        return capfd.readouterr().err

    assert f", bf16 (that of {tmp_path / 'ref'}; here this CPU emulates bf16" in run("takes_it")
    with pytest.raises(IntegrityError, match=r"set model\.precision = 'bf16' to use it, or write a new one"):
        run("another", precision="fp32")
    # the refused start binds nothing: doing what it says works, in the same folder
    assert ", bf16 (as asked for, though this CPU emulates bf16" in run("another", precision="bf16")
    # what a run began with goes before what a cache has: or it would go on in another precision
    values = config("takes_it", {}).model_copy(update={"run_dir": tmp_path / "fp32"})
    train(values.model_copy(update={"reference": values.reference.model_copy(update={"path": None}),
                                    "model": values.model.model_copy(update={"precision": "fp32"})}))  # fmt: skip
    assert bound_by(values) == ("fp32", BEGAN)
    assert bound_by(values.model_copy(update={"run_dir": tmp_path / "new"})) == ("bf16", f"that of {tmp_path / 'ref'}")


def test_a_cache_of_a_version_that_wrote_no_settings_binds_nothing(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "manifest.json", {"format": cache.FORMAT, "digest": {"weights": "0"}})
    assert cache.began_precision(tmp_path) is None


def test_an_evaluation_in_another_precision_says_what_to_give(
    inputs: Path, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("AMD EPYC 7003 (Zen 3)")
    ranked = write_tiny_dataset(tmp_path / "rank", "rank", seed=5, groups=4)
    values = {"out": tmp_path / "ev", "model": {"path": inputs / "model"}, "data": {"dataset": ranked}}
    assert evaluate(EvalConfig.model_validate(values)) == 0
    assert read_json(tmp_path / "ev" / "accuracy.json")["precision"] == "fp32"  # what was computed, not `auto`
    values["model"] = {"path": inputs / "model", "precision": "bf16"}
    with pytest.raises(IntegrityError, match=r"set model\.precision = 'fp32' to use it, or give another --out$"):
        evaluate(EvalConfig.model_validate(values))


def test_a_configuration_put_into_the_run_folder_by_hand_is_decided_at_the_start(
    inputs: Path, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("AMD EPYC 7003 (Zen 3)")
    config = tiny_run(tmp_path / "run", inputs / "model", inputs / "pair", model={"precision": "auto"}, loss={
        "name": "dpo", "beta": 0.3}, max_steps=1)  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(dump_toml(config))
    assert began_precision(tmp_path / "run") is None
    train(config)
    assert began_precision(tmp_path / "run") == "fp32"


def test_sampling_on_a_cpu_that_emulates(tmp_path: Path, machine: Callable[[str], None]) -> None:
    values = {"prompts": ["p.jsonl"], "output": tmp_path / "out.jsonl", "source": "s", "model": tmp_path}
    config = SampleConfig.model_validate(values)
    machine("AMD EPYC 7003 (Zen 3)")
    assert sample._settled(config).dtype == "float32"
    machine("AMD EPYC 9004 (Zen 4)")
    assert sample._settled(config).dtype == "auto"  # vLLM's own: the folder's
    write_json_atomic(tmp_path / "out.jsonl.manifest.json", {"identity": {"settings": {"dtype": "float32"}}})
    assert chunks.recorded_setting(config.output, "dtype") == "float32"
    assert sample._settled(config).dtype == "float32"
    assert sample._settled(config.model_copy(update={"dtype": "float16"})).dtype == "float16"


def test_a_reward_model_s_precision_is_part_of_the_scores_identity(tmp_path: Path) -> None:
    values = {"inputs": ["a.jsonl"], "output": tmp_path / "out.jsonl", "model": tmp_path, "device": "cpu"}
    config = ScoreConfig.model_validate(values)
    assert score._settled(config).dtype == "float32"
    folder = tmp_path / "out.jsonl.chunks"
    folder.mkdir()
    write_json_atomic(folder / "identity.json", {"settings": {"dtype": "bfloat16"}})
    assert score._settled(config).dtype == "float32"  # a start that made nothing binds nobody
    (folder / "00000.jsonl").touch()
    assert score._settled(config).dtype == "bfloat16"  # begun on a GPU
    judged = config.model_copy(update={"reward": "judge"})
    assert score._settled(judged).dtype == "auto"


def test_scores_of_before_it_was_recorded_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"inputs": ["a.jsonl"], "output": tmp_path / "out.jsonl", "model": tmp_path, "device": "cpu"}
    write_json_atomic(tmp_path / "out.jsonl.manifest.json", {"identity": {"settings": {"dtype": "auto"}}})
    config = score._settled(ScoreConfig.model_validate(values))
    assert config.dtype == "auto"  # so the identity stays
    seen: dict[str, Any] = {}
    monkeypatch.setattr("megafuse.rewards.models.RewardModel", lambda *args, **given: seen.update(given))
    score._reward_model(config)
    assert (seen["dtype"], seen["device"]) == (torch.float32, CPU)
