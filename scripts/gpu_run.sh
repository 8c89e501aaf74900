#!/usr/bin/env bash
# A GPU that is lent for half an hour, in four commands that each end well within ten minutes and need no network.
#
#   bash scripts/gpu_run.sh correct     every loss against the float64 oracle; the kernels, compiled; tests/gpu
#   bash scripts/gpu_run.sh kernels     the log-prob kernels and their peers: Llama 3 8B's head, then Gemma 2 9B's
#   bash scripts/gpu_run.sh train       FusePO of Llama 3.2 1B, K = 4 and 16, shared and separate rows; TRL beside it
#   bash scripts/gpu_run.sh trace       a profiler trace of one step, the step with sdpa in place of flex, and both alone
#
# Beforehand, where there is a network: make gpu-wheels DATA=scored.jsonl.gz; take the folders wheels/ and .gpu/ along.
# OUT (build/gpu_run/COMMAND) gets a log and a JSON file of each piece, and summary.txt: at most 8 files of at most 16
# MiB. Every piece has a limit of its own, and its files are written as it goes, so that a piece that is cut leaves what
# it had. The limits of a command, and those of what is done before it on a machine that has nothing installed, add up
# to less than 600 s. PYTHON (python3) is the machine's Python, with torch; DATA the lengths that are trained on (the one
# .jsonl in .gpu/). Exit status: 0 where every piece has 0, else the largest of them. Where there is no CUDA device,
# `correct` says so at once, with 2; the others are a rehearsal: everything is installed, and every piece ends with 2.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# = 1 ] || usage
case $1 in correct | kernels | train | trace) ;; *) usage ;; esac
OUT=${OUT:-$PWD/build/gpu_run/$1}
# shellcheck source=scripts/gpu_env.sh
source scripts/gpu_env.sh
if [ "$1" = correct ]; then need_device "gpu_run.sh $1"; else find_device; fi
mkdir -p "$OUT" build
summary=$OUT/summary.txt
worst=0

say() { echo "$*" | tee -a "$summary"; }

piece() { # piece NAME SECONDS COMMAND...: its log, its limit, and its verdict where the summary and the reader find it
  local name=$1 seconds=$2 begin=$SECONDS rc=0
  shift 2
  timeout -k 10 "$seconds" "$@" > "$OUT/$name.log" 2>&1 || rc=$?
  say "== $name: rc $rc after $((SECONDS - begin)) s$([ "$rc" != 124 ] || echo " (its limit)")"
  return "$rc"
}

worse() { [ "$1" -le "$worst" ] || worst=$1; }

alone() { # a piece that has the device to itself; the end of its log is shown
  local lines=$1
  shift
  piece "$@" || worse $?
  tail -n "$lines" "$OUT/$1.log"
}

on_device() { # on_device LINES NAME SECONDS COMMAND...: alone, if there is a device: a CPU would take days
  if [ "$device" = cuda ]; then
    alone "$@"
  else
    echo "$2 measures a CUDA device, and there is none here" | tee "$OUT/$2.log"
    say "== $2: rc 2 after 0 s"
    worse 2
  fi
}

facts() {
  local asked=name,memory.total,driver_version,clocks.sm
  nvidia-smi --query-gpu=$asked --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
  timeout -k 5 60 "$PYTHON" -W ignore -m megafuse doctor 2>/dev/null | grep -v absent || true
}

correct() { # three groups side by side: nothing here is timed, and what asserts times is in `kernels`
  local running=() pid
  piece gpu_check 430 "$PYTHON" -W ignore -m megafuse.testing.gpu_check --out "$OUT/gpu_check.json" --seconds 380 &
  running+=($!)
  OMP_NUM_THREADS=1 piece kernels 430 "$PYTHON" -m pytest -q -n "$1" --dist load --timeout 200 -p no:cacheprovider \
    --maxfail 40 -m "not timed" "${GPU_KERNEL_TESTS[@]}" &
  running+=($!)
  OMP_NUM_THREADS=2 piece gpu 430 "$PYTHON" -m pytest -q -n "$2" --dist loadfile --timeout 300 -p no:cacheprovider \
    tests/gpu &
  running+=($!)
  for pid in "${running[@]}"; do wait "$pid" || worse $?; done
  grep -hE "^(FAILED|ERROR)|passed|failed|skipped| ok$|OUT OF BOUNDS|FAILED|recompile_limit|unfused|none here" \
    "$OUT"/{gpu_check,kernels,gpu}.log | cut -c1-220 | sort | uniq -c | sort -rn | head -60
}

kernels() { # a process for each shape, so that what one shape breaks does not cost the others
  local measure=("$PYTHON" -W ignore bench/kernels.py --repeats 12)
  on_device 4 timed 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m timed tests/kernels/test_bench_kernels.py
  alone 90 llama 240 "${measure[@]}" --out "$OUT/llama.json" --seconds 210 --shapes llama-3-8b --tokens 8192 32768 \
    --responses 0.5 1.0
  alone 30 gemma 110 "${measure[@]}" --out "$OUT/gemma.json" --seconds 85 --shapes gemma-2-9b --tokens 8192 --responses 1.0
}

bench() { # bench NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  on_device 22 "$name" "$seconds" "$PYTHON" -W ignore -m megafuse bench --model.path llama-3.2-1b --data.path "$DATA" \
    --loss dpo --warmup 1 --steps 3 --out "$OUT/$name.json" "$@"
}

lengths() {
  local found=()
  if [ -z "${DATA:-}" ]; then
    mapfile -t found < <(compgen -G '.gpu/*.jsonl*')
    [ "${#found[@]}" -le 1 ] || { say "scored answers in .gpu/: ${found[*]}; keep one of them, or set DATA"; exit 2; }
    DATA=${found[0]:-}
  fi
  [ -e "$DATA" ] || { say "no scored answers in .gpu/: make gpu-wheels DATA=scored.jsonl.gz, or set DATA"; exit 2; }
}

train() {
  bench megafuse_1b 270 --sources 4 16
  alone 34 trl_1b 170 "$PYTHON" -W ignore bench/peers/trl_dpo.py --model llama-3.2-1b --data "$DATA" --sources 4 \
    --pairs-per-forward 16 8 --warmup 1 --steps 2 --out "$OUT/trl_1b.json"
}

trace() {
  bench traced 130 --sources 4 --prefix_sharing shared --global_batch_size 16 --observe.trace "$OUT/trace"
  bench sdpa 130 --sources 4 --prefix_sharing shared --model.attention sdpa
  alone 40 flex 150 "$PYTHON" -W ignore bench/flex.py --out "$OUT/flex.json" --seconds 130
}

fit() { # what comes back is at most 8 files of 16 MiB: of a longer log its end, and word of anything else
  local file bytes count
  while IFS= read -r file; do
    bytes=$(stat -c %s "$file")
    [ "$bytes" -gt $((16 << 20)) ] || continue
    case $file in
      *.log) tail -c $((4 << 20)) "$file" > "$file.end" && mv "$file.end" "$file" ;;
      *) say "$file has $bytes bytes, more than 16 MiB" ;;
    esac
  done < <(find "$OUT" -type f)
  count=$(find "$OUT" -type f | wc -l)
  [ "$count" -le 8 ] || say "$count files in $OUT, more than 8"
}

echo "== $1, $(date -u +%FT%TZ), $("$PYTHON" -V)" > "$summary"
case $1 in train | trace) lengths ;; esac
{ install_wheels wheels .gpu && build_extension; } > build/gpu_setup.log 2>&1 ||
  { cat build/gpu_setup.log; say "== setup: failed: $(tail -n 3 build/gpu_setup.log)"; exit 1; }
facts | tee -a "$summary"
cores=$(nproc)
"$1" $((cores < 16 ? (cores + 1) / 2 : 6)) $((cores < 16 ? 1 : 3))
fit
exit "$worst"
