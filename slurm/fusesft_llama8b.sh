#!/usr/bin/env bash
# FuseSFT of Llama-3.1-8B-Instruct, from scored answers to a Hugging Face folder. In the repository's root:
#
#   MODEL=/models/Llama-3.1-8B-Instruct DATA='scored/*.jsonl.gz' sbatch -N 4 slurm/fusesft_llama8b.sh
#
# Further arguments go to `megafuse train`: ... fusesft_llama8b.sh --optim.lr 7e-6
# Any number of nodes (-N). Submitted again with the same RUN it goes on where it stopped: finished stages are skipped,
# training resumes. It does so by itself (requeue) 300 s before its time limit, after a crash, a hang, or the loss of a
# node. What every script knows besides (RUN, NPROC, HEALTH, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=fusesft-llama8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
: "${DATA:?set DATA to the scored answers, .jsonl or .jsonl.gz, wildcards allowed}"
BUILD=${BUILD:-} # further arguments of `megafuse build`, for example --max_prompts 20000
TP=${TP:-2} PP=${PP:-1} # tensor- and pipeline-parallel ranks; data parallel is what is left
VPP=${VPP:-1} CP=${CP:-1} EP=${EP:-1} # chunks a pipeline stage, context- and expert-parallel ranks: docs/layouts.md
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
LOSS=sft
loss
layout
preset=$PRESETS/fusesft_llama8b.toml
check_data
check_train "$preset" "$@"
check_model
check_nodes

build_data "${KIND[@]}"
import_model
train_and_export "$preset" "$@"
