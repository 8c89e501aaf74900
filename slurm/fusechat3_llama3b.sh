#!/usr/bin/env bash
# FuseChat-3.0 of Llama-3.2-3B-Instruct: SFT on the best response, then DPO on pairs within a source, with the paper's rates.
# In the repository's root:
#
#   MODEL=/models/Llama-3.2-3B-Instruct DATA='scored/*.jsonl.gz' sbatch -N 4 slurm/fusechat3_llama3b.sh
#
# Any number of nodes (-N). Submitted again, or requeued, it goes on where it stopped. The model will be RUN/po/hf.
#
#   MODEL  Hugging Face folder of the target model (required)
#   DATA   scored answers: .jsonl or .jsonl.gz files, wildcards allowed (required)
#   RUN    folder for everything that is made, on a file system that all nodes see; default runs/JOBNAME
#   SFT_LR PO_LR LOSS BETA   the paper's values for this target, see below
#   TP PP VPP CP EP NPROC HEALTH MAX_RESTARTS BUILD   as in fusepo_llama8b.sh; TP here 2
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
SFT_LR=${SFT_LR:-5e-6} PO_LR=${PO_LR:-1e-6} LOSS=${LOSS:-ln_dpo} BETA=${BETA:-10} TP=${TP:-2}
# shellcheck source=slurm/fusechat3.sh
source "$MEGAFUSE_ROOT/slurm/fusechat3.sh"
