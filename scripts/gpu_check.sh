#!/usr/bin/env bash
# The checks that need a GPU, with the Python, torch and compiler of the machine; no network, nothing installed into them.
#
#   make gpu-check [WHEELS=folder]      WHEELS: wheels of what the machine's Python lacks (megatron-core, pydantic, ...)
#
# PYTHON picks the interpreter, REPORT the file that the measurements go to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
REPORT=${REPORT:-bench/results/gpu_check.json}
site=$PWD/build/gpu_site

if [ -n "${WHEELS:-}" ]; then
  # a wheel of something that is there already would shadow it, perhaps with another CUDA build: leave it out
  mapfile -t missing < <("$PYTHON" - "$WHEELS" <<'PY'
import importlib.metadata, pathlib, sys

for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PY
  )
  rm -rf "$site"
  if [ "${#missing[@]}" -gt 0 ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "${missing[@]}"
  fi
fi
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
"$PYTHON" setup.py --quiet build_ext --inplace
"$PYTHON" -m megafuse doctor || true # what it finds wanting may not matter to what follows

folders=(tests/kernels)
if [ -d tests/gpu ]; then folders+=(tests/gpu); fi
failed=0
"$PYTHON" -m pytest "${folders[@]}" || failed=$?
mkdir -p "$(dirname "$REPORT")"
"$PYTHON" -m megafuse.testing.gpu_check --out "$REPORT" || failed=$?
exit "$failed"
