#!/usr/bin/env bash
# Wheels for a GPU machine without network whose Python 3.12 has torch, triton, transformers and numpy, but not the rest.
#
#   make gpu-wheels [DATA=scored.jsonl.gz]      wheels/: what megafuse needs there; .gpu/: the peers that it is measured
#                                               against, and a copy of DATA, the lengths that `gpu_run.sh train` takes
#
# Versions are those of constraints.txt, of the peers those named here. Both folders are git-ignored; take them along
# (some 9 MB) and `gpu_run.sh` and `gpu_check.sh` install from them. PYTHON is any Python with pip: nothing is installed.
# TARGET_PYTHON (3.12) and TARGET_MACHINE (x86_64) are those of the GPU machine. A wheel of another version is replaced.
# Not to be had this way: quack-kernels (its compiler alone has 92 MB) and Transformer Engine (te_env.sh builds one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} TARGET_PYTHON=${TARGET_PYTHON:-3.12} TARGET_MACHINE=${TARGET_MACHINE:-x86_64}
[ -z "${DATA:-}" ] || [ -f "$DATA" ] || { echo "DATA=$DATA is not there: give a .jsonl or .jsonl.gz file" >&2; exit 2; }
case ${DATA:-} in '' | *.jsonl | *.jsonl.gz) ;; *) # gpu_run.sh finds it by its ending
  echo "DATA=$DATA: give a .jsonl or .jsonl.gz file" >&2; exit 2 ;;
esac

# pydantic works with exactly one version of pydantic-core: constraints.txt has the pair
needed=(megatron-core pydantic pydantic-core annotated-types tyro docstring-parser typeguard datasets dill multiprocess
  typing-inspection pytest-timeout pytest-xdist execnet)
peers=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0)

unpinned=()
for name in "${needed[@]}"; do grep -q "^$name==" constraints.txt || unpinned+=("$name"); done
[ "${#unpinned[@]}" = 0 ] || { echo "constraints.txt has no version of ${unpinned[*]}" >&2; exit 2; }

platforms=() # pip takes the names as they are: a wheel for glibc 2.17 is not found under 2.28
for glibc in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${glibc}_$TARGET_MACHINE")
done

fetch() { # fetch FOLDER PACKAGES...: these and nothing that they depend on; all of them, or the folder stays as it is
  local folder=$1 fresh wheel name
  shift
  mkdir -p "$folder"
  fresh=$(mktemp -d "$folder/.fetch.XXXXXX")
  if ! "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
    --python-version "$TARGET_PYTHON" "${platforms[@]}" --constraint constraints.txt --dest "$fresh" "$@"; then
    rm -rf "$fresh"
    return 1
  fi
  for wheel in "$fresh"/*.whl; do # two versions of one package stop pip: the new one takes the place of the old
    name=$(basename "$wheel")
    rm -f "$folder/${name%%-*}"-*.whl
    mv "$wheel" "$folder/"
  done
  rmdir "$fresh"
}

fetch wheels "${needed[@]}"
fetch .gpu "${peers[@]}"
if [ -n "${DATA:-}" ]; then # gpu_run.sh takes the one file that is there, so no other stays
  cp "$DATA" .gpu/.data
  rm -f .gpu/*.jsonl*
  mv .gpu/.data ".gpu/$(basename "$DATA")"
fi
du -ch wheels/*.whl .gpu/*
echo "wheels/: $(find wheels -name '*.whl' | wc -l) wheels, ${#needed[@]} of them needed; .gpu/: ${#peers[@]} peers"
