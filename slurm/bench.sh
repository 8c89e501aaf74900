#!/usr/bin/env bash
# How fast training would be on these nodes: `megafuse bench`, random weights, the lengths of your data. In the
# repository's root:
#
#   MODEL=llama-3.1-8b DATA=scored.jsonl.gz TP=2 sbatch -N 2 slurm/bench.sh
#
# Any number of nodes (-N). Further arguments go to `megafuse bench`: ... bench.sh --sources 1 2 4 8 16 --loss sft
# Nothing is downloaded and no tokenizer is needed. The table is in the job's output, numbers in RUN/bench-JOBID.json.
# What every script knows besides (RUN, NPROC, HEALTH, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=megafuse-bench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --output=%x-%j.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
: "${DATA:?set DATA to scored answers (one .jsonl or .jsonl.gz file) or a data set folder: the lengths}"
MODEL=${MODEL:-llama-3.1-8b} # named shape, Hugging Face folder or checkpoint
TRACE=${TRACE:-} # folder for torch profiler traces, one a kind
TP=${TP:-2} PP=${PP:-1} # tensor- and pipeline-parallel ranks; data parallel is what is left
VPP=${VPP:-1} CP=${CP:-1} EP=${EP:-1} # chunks a pipeline stage, context- and expert-parallel ranks: docs/layouts.md
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
MAX_RESTARTS=0 # a benchmark that fails is not begun again
layout
[ -e "$DATA" ] || refuse "DATA $DATA is not there: set DATA to a file or a data set folder that this node sees"
check_shape
OUT=$RUN/bench-$SLURM_JOB_ID.json
bench=(bench --model.path "$MODEL" --data.path "$DATA" --out "$OUT" ${TRACE:+--observe.trace "$TRACE"}
  "${LAYOUT[@]}" "$@")
check "${bench[@]}"
check_nodes

say "bench $MODEL"
every_node "${bench[@]}"
say "done: $OUT"
