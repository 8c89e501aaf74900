#!/usr/bin/env bash
# The measurements that need a GPU: training throughput on real lengths, and the log-prob kernels. After gpu_check.sh,
# whose packages it uses.
#
#   make gpu-bench DATA=scored.jsonl.gz [OUT=folder]
#
# DATA holds scored answers (.jsonl, .jsonl.gz) or is a data set folder: the lengths. Results go to OUT (bench/results):
# bench_llama1b.json and kernels_DEVICE.json, written after every kind and case. PYTHON picks the interpreter. Exit status:
# 0 all was measured; 2 no CUDA device; else what failed last.
#
# What FusePO of a Llama-3.2-1B is to reach on one H100: with K = 4 sources prefix-shared rows take 1.6 times the
# prompts/s of separate rows, at an MFU of 0.5; and time grows with K by no more than the tokens do. The step with
# K = 16 may take as many times the one with K = 4 as it has tokens (`tokens` of both in the JSON): 3.6 where a prompt
# is 1.2 times as long as a response, 3.65 on GSM8K (139 + 32 x 131 over 139 + 8 x 131), close to 4 with short prompts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${DATA:-}" ] || { echo "set DATA to scored answers, .jsonl or .jsonl.gz: the lengths" >&2; exit 2; }
OUT=${OUT:-bench/results}
# shellcheck source=scripts/gpu_env.sh
source scripts/gpu_env.sh
need_device gpu_bench.sh
mkdir -p "$OUT"
failed=0
"$PYTHON" -m megafuse bench --model.path llama-3.2-1b --data.path "$DATA" --loss dpo --sources 4 16 \
  --out "$OUT/bench_llama1b.json" || failed=$?
"$PYTHON" bench/kernels.py --out "$OUT" || failed=$?
exit "$failed"
