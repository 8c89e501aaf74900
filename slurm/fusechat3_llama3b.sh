#!/usr/bin/env bash
# FuseChat-3.0 of Llama-3.2-3B-Instruct: SFT on the best response, then DPO on pairs within a source.
# In the repository's root:
#
#   MODEL=/models/Llama-3.2-3B-Instruct DATA='scored/*.jsonl.gz' sbatch -N 4 slurm/fusechat3_llama3b.sh
#
# The model will be RUN/po/hf.
# Any number of nodes (-N). Submitted again with the same RUN it goes on where it stopped: finished stages are skipped,
# training resumes. It does so by itself (requeue) 300 s before its time limit, after a crash, a hang, or the loss of a
# node. What every script knows besides (RUN, NPROC, HEALTH, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=fusechat3-llama3b
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
SFT_LR=${SFT_LR:-5e-6} PO_LR=${PO_LR:-1e-6} # the paper's rates for this target
LOSS=${LOSS:-ln_dpo} BETA=${BETA:-10} # the paper's preference loss for this target
BUILD=${BUILD:-} # further arguments of `megafuse build`, in both stages
TP=${TP:-2} PP=${PP:-1} # tensor- and pipeline-parallel ranks; data parallel is what is left
VPP=${VPP:-1} CP=${CP:-1} EP=${EP:-1} # chunks a pipeline stage, context- and expert-parallel ranks: docs/layouts.md
# shellcheck source=slurm/fusechat3.sh
source "$MEGAFUSE_ROOT/slurm/fusechat3.sh"
