#!/usr/bin/env bash
# The checks that need a GPU, with the Python, torch and compiler of the machine; no network, nothing installed into them.
#
#   make gpu-check [WHEELS=folder] [OUT=folder]
#
# WHEELS holds wheels of what the machine's Python lacks (`make gpu-wheels` fetches them where there is a network).
# gpu_check.json (device, versions, every loss against the oracle) goes to OUT (bench/results), or to the file REPORT,
# and is written after every run. PYTHON picks the interpreter. Where a command may take ten minutes only, or files come
# back from one folder only: scripts/gpu_run.sh. Exit status: 0 all is well; 2 no CUDA device; else what failed last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REPORT=${REPORT:-${OUT:-bench/results}/gpu_check.json}
# shellcheck source=scripts/gpu_env.sh
source scripts/gpu_env.sh
need_device gpu_check.sh
if [ -n "${WHEELS:-}" ]; then install_wheels "$WHEELS"; fi
build_extension
"$PYTHON" -m megafuse doctor || true # what it finds wanting may not matter to what follows

failed=0
"$PYTHON" -W ignore -m megafuse.testing.gpu_check --out "$REPORT" || failed=$?
[ "$failed" != 2 ] || exit 2
"$PYTHON" -m pytest "${GPU_KERNEL_TESTS[@]}" tests/gpu || failed=$?
exit "$failed"
