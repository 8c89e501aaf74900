#!/usr/bin/env bash
# An environment with NeMo-Run for the tests of `megafuse launch`: its pins do not fit beside everything else. Prints the
# path of its Python (MEGAFUSE_NEMO_PYTHON) where it could be made; otherwise the reason on stderr, and the tests skip.
#
#   MEGAFUSE_NEMO_PYTHON=$(bash scripts/ci_launch.sh)
#
#   NEMO_VENV     its folder; default .venv-launch
#   NEMO_SECONDS  how long it may take; default 240
#   PYTHON        Python 3.10 or newer; default python3
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 0
venv=$(realpath -m "${NEMO_VENV:-.venv-launch}")
# what `megafuse launch` itself imports; the jobs that it starts run in another environment
packages=("nemo-run>=0.11" "leptonai<0.47" "pydantic>=2.8" "tyro>=0.9" "rich>=13.7" "tomli; python_version < '3.11'")

make_it() {
  "${PYTHON:-python3}" -m venv "$venv" &&
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
}
export -f make_it
export venv
list=$(printf '%q ' "${packages[@]}")
if ! "$venv/bin/python" -c "import nemo_run" 2>/dev/null; then
  said=$(timeout "${NEMO_SECONDS:-240}" bash -c "packages=($list); make_it" 2>&1) ||
    { echo "no NeMo-Run (exit code $?): $(tail -n 1 <<<"$said")" >&2; exit 0; }
fi
if "$venv/bin/python" -c "import nemo_run" 2>/dev/null; then
  echo "$venv/bin/python"
else
  echo "no NeMo-Run: $venv cannot import it" >&2
fi
