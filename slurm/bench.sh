#!/usr/bin/env bash
# How fast training would be on these nodes: `megafuse bench`, random weights, the lengths of your data. In the
# repository's root:
#
#   MODEL=llama-3.1-8b DATA=scored.jsonl.gz TP=2 sbatch -N 2 slurm/bench.sh
#
# Any number of nodes (-N). Further arguments go to `megafuse bench`: ... bench.sh --sources 1 2 4 8 16 --loss sft
# Nothing is downloaded and no tokenizer is needed. The table is in the job's output, all numbers in RUN/bench-JOBID.json.
#
#   DATA   scored answers (one .jsonl or .jsonl.gz file) or a data set folder: the lengths (required)
#   MODEL  named shape, Hugging Face folder or checkpoint; default llama-3.1-8b
#   RUN    folder for the result, on a file system that all nodes see; default runs/JOBNAME
#   TP PP  tensor- and pipeline-parallel ranks; default 2 and 1. Data parallel is what is left.
#   VPP CP EP  chunks a pipeline stage, context- and expert-parallel ranks; default 1. See docs/layouts.md
#   TRACE  folder for torch profiler traces, one a kind; default none
#   NPROC  processes a node; default: the GPUs that Slurm gives
#SBATCH --job-name=megafuse-bench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --output=%x-%j.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
export MODEL=${MODEL:-llama-3.1-8b}
MAX_RESTARTS=0 # a benchmark that fails is not begun again
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
layout "${TP:-2}" "${PP:-1}"

OUT=$RUN/bench-$SLURM_JOB_ID.json
say "bench $MODEL"
every_node bench --model.path "$MODEL" --data.path "$DATA" --out "$OUT" ${TRACE:+--observe.trace "$TRACE"} \
  "${LAYOUT[@]}" "$@"
say "done: $OUT"
