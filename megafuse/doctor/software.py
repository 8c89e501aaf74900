"""Probes of installed software. Heavy imports happen inside the probes; optional ones in a child process."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megafuse.doctor.finding import Finding, try_import, version

# the ranges of pyproject.toml (a test compares), for an installation without metadata
REQUIRED = {
    "torch": ">=2.6",
    "megatron-core": ">=0.16.1,<0.20",
    "psutil": "",
    "transformers": ">=5.3",
    "datasets": ">=3.0",
    "safetensors": ">=0.4.3",
    "numpy": ">=1.26",
    "pydantic": ">=2.8",
    "tyro": ">=0.9",
    "rich": ">=13.7",
    "jinja2": ">=3.1",
    "tensorboard": ">=2.16",
    "matplotlib": ">=3.8",
}
REINSTALL = "pip install -c constraints.txt -e . (in the repository)"


def python() -> Finding:
    """The interpreter (an older one than 3.10 cannot even read this file)."""
    return Finding("Python", "ok", f"{sys.version.split()[0]} at {sys.executable}", core=True)


def requirements() -> Finding:
    """Every core dependency: installed, and inside its range."""
    from packaging.specifiers import SpecifierSet

    wrong = []
    for name, wanted in REQUIRED.items():
        have = version(name)
        if have is None:
            wrong.append(f"{name} is not installed")
        elif not SpecifierSet(wanted).contains(have, prereleases=True):
            wrong.append(f"{name} {have} is outside {wanted}")
    if wrong:
        return Finding("dependencies", "problem", "; ".join(wrong), REINSTALL, core=True)
    shown = ("megatron-core", "transformers", "datasets", "pydantic", "psutil")
    return Finding("dependencies", "ok", ", ".join(f"{name} {version(name)}" for name in shown), core=True)


def torch() -> Finding:
    """PyTorch: its build, devices, NCCL; a CPU build on a machine with an NVIDIA driver is pointed out."""
    module = importlib.import_module("torch")
    build = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU build"
    detail = f"{module.__version__} ({build})"
    if module.cuda.is_available():
        names = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())]
        nccl = ".".join(map(str, module.cuda.nccl.version())) if module.distributed.is_nccl_available() else "absent"
        return Finding("torch", "ok", f"{detail}, NCCL {nccl}, {len(names)} x {names[0]}", core=True)
    fix = ""
    if shutil.which("nvidia-smi"):
        if not module.version.cuda:
            fix = "this machine has an NVIDIA driver: install a CUDA build of torch to use it"
        else:
            fix = "torch sees no GPU: check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that the driver is new enough"
    return Finding("torch", "ok", f"{detail}, no CUDA device: CPU and gloo", fix, core=True)


def megatron() -> Finding:
    """megatron-core imports, not only installs."""
    importlib.import_module("megatron.core.parallel_state")
    return Finding("megatron-core", "ok", f"{version('megatron-core')} imports", core=True)


def gloo() -> Finding:
    """A process group of one, with an all-reduce: fails where the host name or the loopback interface is broken."""
    import datetime

    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return Finding("gloo", "ok", "a process group is already running", core=True)
    if not dist.is_gloo_available():
        return Finding("gloo", "problem", "this torch has no gloo", "install torch from PyPI", core=True)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        value = torch.ones(1)
        dist.all_reduce(value)
    finally:
        dist.destroy_process_group()
    return Finding("gloo", "ok", "process group and all-reduce work", core=True)


def triton() -> Finding:
    """Triton, which the fused log-prob kernels need on CUDA."""
    if not version("triton"):
        return Finding(
            "triton", "absent", "the torch backend of the kernels is used", "pip install triton (Linux, CUDA)"
        )
    error = try_import("import triton")
    if error:
        return Finding("triton", "problem", error, "pip install --force-reinstall the triton that your torch asks for")
    return Finding("triton", "ok", f"{version('triton')} (used on CUDA)")


def extension() -> Finding:
    """The pybind11 packer, without which no batch can be laid out."""
    fix = f"{REINSTALL}; needs a C++17 compiler"
    try:
        module = importlib.import_module("megafuse.kernels._C")
    except ModuleNotFoundError:
        return Finding("megafuse.kernels._C", "problem", "not built: groups cannot be packed into rows", fix, core=True)
    except ImportError as error:
        return Finding("megafuse.kernels._C", "problem", str(error).splitlines()[0], f"rebuild it: {fix}", core=True)
    return Finding("megafuse.kernels._C", "ok", Path(str(module.__file__)).name, core=True)


def apex() -> Finding:
    """NVIDIA Apex, told by its contents from the unrelated `apex` of the Python package index."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("NVIDIA Apex", "absent", "optional: faster optimizers and norms", "build it from its source")
    folders = list(spec.submodule_search_locations or [])
    if not any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        place = folders[0] if folders else spec.origin
        return Finding(
            "NVIDIA Apex",
            "problem",
            f"the `apex` at {place} is another project of the same name: it has no apex.optimizers.FusedAdam",
            "pip uninstall apex; then, if you want NVIDIA Apex, build it from its source (never `pip install apex`)",
        )
    error = try_import("import torch, amp_C; from apex.optimizers import FusedAdam")
    if error:
        fix = "rebuild NVIDIA Apex from source with --cpp_ext --cuda_ext against this torch, or: pip uninstall apex"
        return Finding("NVIDIA Apex", "problem", error, fix)
    return Finding("NVIDIA Apex", "ok", "FusedAdam and amp_C import")


def optional_package(label: str, distribution: str, statement: str, use: str, install: str) -> Finding:
    """A package behind an extra: absent, broken (with the error of its import), or usable."""
    have = version(distribution)
    if have is None:
        return Finding(label, "absent", f"optional: {use}", install)
    error = try_import(statement)
    if error:
        return Finding(label, "problem", f"{have}: {error}", f"{install}, or remove it: pip uninstall {distribution}")
    return Finding(label, "ok", f"{have}: {use}")


def transformer_engine() -> Finding:
    """Transformer Engine: imports, and has the CUDA device without which it computes nothing."""
    install = "pip install --no-build-isolation -e '.[te]' (in the repository; CUDA)"
    found = optional_package(
        "Transformer Engine",
        "transformer-engine",
        "import transformer_engine.pytorch",
        "fused layers and FP8 on CUDA",
        install,
    )
    if found.status == "ok" and not importlib.import_module("torch").cuda.is_available():
        return Finding(found.name, "absent", f"{found.detail}; importable, but unused without a CUDA device")
    return found


def _extra(name: str) -> str:
    """How an extra is installed: megafuse itself is on no package index."""
    return f"pip install -e '.[{name}]' (in the repository)"


# name -> distribution, import statement, use, installation
EXTRAS = {
    "vLLM": ("vllm", "import vllm", "sampling from source models", _extra("vllm")),
    "NeMo-Run": ("nemo-run", "import nemo_run", "launching from Python", _extra("launch")),
    "math-verify": ("math-verify", "import math_verify", "checking math answers", _extra("math")),
}


def hf_kernels() -> Finding:
    """`import kernels` must find Hugging Face's package or nothing: transformers probes for that name."""
    spec = importlib.util.find_spec("kernels")
    name, have = "top-level `kernels`", version("kernels")
    if spec is None:
        return Finding(name, "ok", "nothing on sys.path has that name")
    if spec.origin is None:
        where = next(iter(spec.submodule_search_locations or []), "?")
        return Finding(name, "ok", f"only a plain folder ({where}), which hides nothing")
    if have is None:
        fix = f"remove its __init__.py or start Python elsewhere with PYTHONSAFEPATH=1: {Path(spec.origin).parent}"
        return Finding(name, "problem", "a folder poses as Hugging Face's `kernels`; transformers would import it", fix)
    return Finding(name, "ok", f"Hugging Face kernels {have}")


def slurm() -> Finding:
    """The scheduler: its client programs, and a controller that answers them."""
    sinfo = shutil.which("sinfo")
    if sinfo is None:
        return Finding("Slurm", "absent", "no sinfo on PATH: slurm/*.sh run on a cluster's login node")
    fix = "run on a login node of the cluster, or start slurmctld; `megafuse launch --on local` does without Slurm"
    try:
        asked = [sinfo, "--noheader", "--format=%P %D"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return Finding("Slurm", "problem", "sinfo has no answer after 30 s: the controller cannot be reached", fix)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        return Finding("Slurm", "problem", f"sinfo fails: {lines[-1]}"[:300], fix)
    partitions = done.stdout.split("\n")
    named = ", ".join(" x ".join(reversed(line.split())) for line in partitions if line.strip())
    return Finding("Slurm", "ok", f"nodes by partition: {named or 'none'}")


def compiler() -> Finding:
    """The C++ compiler that builds the packer (and Triton's launchers)."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        return Finding("C++ compiler", "absent", "none found: the packer cannot be built here", "apt-get install g++")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return Finding("C++ compiler", "ok", (done.stdout.splitlines() or [path])[0])
