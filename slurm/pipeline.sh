#!/usr/bin/env bash
# FuseSFT, then FusePO of its result: two jobs, the second begins when the first has succeeded. Not for sbatch: run it
# where you submit jobs, in the repository's root. Arguments are options of sbatch, for both jobs:
#
#   MODEL=/models/Llama-3.1-8B-Instruct DATA='scored/*.jsonl.gz' bash slurm/pipeline.sh -N 4 --time=12:00:00
#
#   MODEL DATA  as in fusesft_llama8b.sh (required)
#   RUN         folder; the jobs work in RUN/fusesft and RUN/fusepo; default runs/pipeline
#   SFT PO      the two scripts; default slurm/fusesft_llama8b.sh and slurm/fusepo_llama8b.sh
#   SFT_BUILD PO_BUILD  further arguments of `megafuse build` in each
# Every other variable (TP, PP, HEALTH ...) reaches both.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
: "${DATA:?set DATA to the scored answers, .jsonl or .jsonl.gz}"
work=$(realpath -m "${RUN:-runs/pipeline}")
[ -f "$MODEL/config.json" ] || { echo "refused: MODEL $MODEL has no config.json" >&2; exit 2; }

first=$(RUN=$work/fusesft BUILD=${SFT_BUILD:-} sbatch --parsable "$@" "${SFT:-slurm/fusesft_llama8b.sh}")
# without kill-on-invalid-dep a job whose predecessor failed would wait for ever
second=$(RUN=$work/fusepo BUILD=${PO_BUILD:-} MODEL=$work/fusesft/hf \
  sbatch --parsable --dependency=afterok:"$first" --kill-on-invalid-dep=yes "$@" "${PO:-slurm/fusepo_llama8b.sh}")
echo "$first $second"
echo "submitted: FuseSFT $first, then FusePO $second; the model will be $work/fusepo/hf" >&2
