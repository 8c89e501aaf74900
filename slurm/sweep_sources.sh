#!/usr/bin/env bash
# How much does each further source bring? One chain of jobs (pipeline.sh) for the first K sources, K = 1 ... all of
# them, in RUN/k1, RUN/k2 ... Not for sbatch: run it where you submit jobs. Arguments are options of sbatch, for all:
#
#   MODEL=/models/Llama-3.1-8B-Instruct DATA=scored.jsonl.gz SOURCES='gemma-2-27b qwen2.5-72b' \
#     bash slurm/sweep_sources.sh
#
# Variables of pipeline.sh and of the scripts behind it (NODES, TP, LOSS ...) reach all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
: "${DATA:?set DATA to the scored answers, .jsonl or .jsonl.gz, wildcards allowed}"
: "${SOURCES:?set SOURCES to names of sources in DATA, in the order in which they join}"
RUN=${RUN:-runs/sweep} # folder of all chains
SFT_BUILD=${SFT_BUILD:-} PO_BUILD=${PO_BUILD:-} # further arguments of `megafuse build` in each stage

work=$RUN taken="" k=0
for source in $SOURCES; do
  k=$((k + 1)) taken+=" $source"
  only="--include_sources$taken"
  RUN=$work/k$k SFT_BUILD="$SFT_BUILD $only" PO_BUILD="$PO_BUILD $only" bash slurm/pipeline.sh "$@" | sed "s/^/k$k /"
done
