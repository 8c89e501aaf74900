# shellcheck shell=bash
# Sourced by the gpu_*.sh scripts, in the repository's root: the machine's own Python with the wheels that it lacks.
PYTHON=${PYTHON:-python3}
# git-ignored, so what is installed once stays; for each Python its own
site=$PWD/build/gpu_site/$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)')
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPYCACHEPREFIX=$PWD/build/pycache
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
# rows of changing size leave holes between the blocks of a fixed size; megatron-core queues communication in order
if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then # the name since torch 2.9: what the user has set by either stays
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# The tests that use a GPU where there is one. The other kernel tests run on the CPU wherever they are.
# shellcheck disable=SC2034
GPU_KERNEL_TESTS=(tests/kernels/test_triton_linear.py tests/kernels/test_triton_logits.py
  tests/kernels/test_triton_heads.py tests/kernels/test_triton_segments.py tests/kernels/test_triton_rope.py tests/kernels/test_group_loss.py
  tests/kernels/test_bench_kernels.py)

find_device() { # sets device to cuda or none; exits with what torch's Python exits with where it cannot be asked
  local rc=0
  "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)' || rc=$?
  case $rc in 0) device=cuda ;; 2) device=none ;; *) exit "$rc" ;; esac
}

need_device() { # need_device NAME: says so and exits with 2 where there is no CUDA device
  find_device
  [ "$device" = cuda ] || { echo "$1 needs a CUDA device, and torch finds none here" >&2; exit 2; }
}

install_wheels() { # install_wheels FOLDER...: the wheels there of what this Python lacks, from no network
  local folder have missing=() seen
  have=$(for folder in "$@"; do compgen -G "$folder/*.whl"; done; "$PYTHON" -VV)
  if [ "$(cat "$site/.wheels" 2>/dev/null)" = "$have" ]; then return 0; fi
  rm -rf "$site"
  # a wheel of something that is there already would shadow it, perhaps with another CUDA build: leave it out
  seen=$(env -u PYTHONPATH "$PYTHON" - "$@" <<'PY'
import importlib.metadata, pathlib, sys

for folder in sys.argv[1:]:
    for wheel in sorted(pathlib.Path(folder).glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            print(wheel)
PY
  ) || return 1
  mapfile -t missing < <(printf '%s' "${seen:+$seen$'\n'}")
  if [ "${#missing[@]}" -gt 0 ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
      --target "$site" "${missing[@]}" || return 1
  fi
  mkdir -p "$site"
  printf '%s' "$have" > "$site/.wheels"
}

build_extension() { # the packer, for this Python, unless it is there; nothing is installed
  local suffix
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || return 1
  [ -e "kernels/_C$suffix" ] || "$PYTHON" setup.py --quiet build_ext --inplace
}
