#!/usr/bin/env bash
# The data set of one stage, from scored answers, without GPUs: so that none wait while texts are tokenised. In the
# repository's root:
#
#   MODEL=/models/Llama-3.1-8B-Instruct DATA='scored/*.jsonl.gz' LOSS=sft RUN=runs/sft sbatch slurm/build.sh
#
# Writes RUN/dataset, which a training script with the same RUN finds. Further arguments go to `megafuse build`.
# Submitted again, or requeued (before its time limit, after a crash), it goes on where it stopped. What every script
# knows besides (RUN, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=megafuse-build
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
: "${DATA:?set DATA to the scored answers, .jsonl or .jsonl.gz, wildcards allowed}"
LOSS=${LOSS:-ln_dpo} # what the data is for: sft | ln_dpo | dpo | simpo | rloo | wrpo
BUILD=${BUILD:-} # further arguments of `megafuse build`
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
BETA=1 # no data depends on it
loss
[ -f "$MODEL/config.json" ] || refuse "MODEL $MODEL has no config.json: set MODEL to a Hugging Face folder"
check_data
# shellcheck disable=SC2086
check build --inputs x --output x --tokenizer "$MODEL" "${KIND[@]}" "$@" $BUILD

build_data "${KIND[@]}" "$@"
say "done: $RUN/dataset"
