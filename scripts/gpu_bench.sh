#!/usr/bin/env bash
# The measurements that need a GPU: training throughput on real lengths, and the log-prob kernels. After gpu_check.sh,
# whose packages it uses.
#
#   make gpu-bench DATA=../shared/data/gsm8k_fusion.jsonl.gz
#
# What FusePO of a Llama-3.2-1B is to reach on one H100: with K = 4 sources prefix-shared rows take 1.6 times the prompts/s
# of separate rows and an MFU of 0.5; K = 16 takes less than 3.6 times the time of K = 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
: "${DATA:?set DATA to scored answers, .jsonl or .jsonl.gz: the lengths}"
export PYTHONPATH=$PWD/build/gpu_site:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
mkdir -p bench/results
"$PYTHON" -m megafuse bench --model.path llama-3.2-1b --data.path "$DATA" --loss dpo --sources 4 16 \
  --out bench/results/bench_llama1b.json
"$PYTHON" bench/kernels.py
