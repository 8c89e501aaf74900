#!/usr/bin/env bash
# A Python environment with a real Transformer Engine, made without a GPU: `make te-check` runs the tests of its layers there.
#
#   bash scripts/te_env.sh FOLDER     PYTHON: 3.12 for the versions below; CUDA_HOME: a CUDA 13 toolkit (nvcc and headers)
#
# About 8 GB and ten minutes. Only the torch extension is compiled (C++, no kernels); its wheel stays in FOLDER/wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${1:?usage: te_env.sh FOLDER}
TORCH=2.11.0 # a build for CUDA 13.0: Transformer Engine's extension is compiled against this torch, and runs with no other
ENGINE=2.20.2
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}

test -x "$CUDA_HOME/bin/nvcc" || { echo "no nvcc in CUDA_HOME=$CUDA_HOME: a CUDA 13 toolkit is needed" >&2; exit 1; }
test -x "$VENV/bin/python" || "${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "torch==$TORCH" "setuptools>=77" wheel "pybind11>=2.13"

# torch and what it pins are as they are; everything else has the tested versions
grep -vE '^(torch|triton|setuptools)==' constraints.txt > "$VENV/constraints.txt"
pip install --quiet --constraint "$VENV/constraints.txt" --no-build-isolation --editable . pytest pytest-timeout
pip install --quiet --no-deps "transformer-engine==$ENGINE" "transformer-engine-cu13==$ENGINE" nvidia-cudnn-frontend
pip install --quiet --constraint "$VENV/constraints.txt" nvdlfw-inspect einops onnx onnxscript

site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
nvidia=$site/nvidia
export CPATH=$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include
export LIBRARY_PATH=$nvidia/cu13/lib:$nvidia/cudnn/lib
# without FORCE_BUILD it looks for a ready wheel on the network
NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=90 MAX_JOBS=${MAX_JOBS:-2} \
  pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$VENV/wheels" "transformer_engine_torch==$ENGINE"
pip install --quiet --no-deps "$VENV"/wheels/transformer_engine_torch-*.whl
"$VENV/bin/python" -c 'import torch, transformer_engine.pytorch as te; print("Transformer Engine:", te.__file__)'
