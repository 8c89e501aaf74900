#!/usr/bin/env bash
# FuseRL (FuseSFT, then FusePO) of a 70B target, Llama-3.1-70B-Instruct, on 4 nodes of 8 GPUs with 80 GB. In the
# repository's root:
#
#   MODEL=/models/Llama-3.1-70B-Instruct DATA='scored/*.jsonl.gz' sbatch slurm/fuserl_llama70b.sh
#
# The model will be RUN/po/hf. Further arguments go to `megafuse train` of both stages.
# No paper trains a target of this size: data, batch, schedule and beta are FuseRL's and FuseChat-3.0's for 8B, the
# learning rates are those of our 8B presets, where a search should begin, and every layer is recomputed. The layout is
# ours: `megafuse doctor layout --model MODEL --ranks 32 --parallel.tensor 8 --parallel.pipeline 4 --parallel.sequence`
# counts 37 GiB a GPU before activations.
# Any number of nodes (-N). Submitted again with the same RUN it goes on where it stopped: finished stages are skipped,
# training resumes. It does so by itself (requeue) 300 s before its time limit, after a crash, a hang, or the loss of a
# node. What every script knows besides (RUN, NPROC, HEALTH, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=fuserl-llama70b
#SBATCH --nodes=4
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
SFT_LR=${SFT_LR:-1e-5} PO_LR=${PO_LR:-5e-7} # those of the 8B presets
LOSS=${LOSS:-ln_dpo} BETA=${BETA:-} # as in fusepo_llama8b.sh
BUILD=${BUILD:-} # further arguments of `megafuse build`, in both stages
TP=${TP:-8} PP=${PP:-4} # tensor- and pipeline-parallel ranks; data parallel is what is left
VPP=${VPP:-1} CP=${CP:-1} EP=${EP:-1} # chunks a pipeline stage, context- and expert-parallel ranks: docs/layouts.md
sft_data=(--alpha 1e-2) po_data=() train=(--model.recompute full "$@")
# shellcheck source=slurm/two_stages.sh
source "$MEGAFUSE_ROOT/slurm/two_stages.sh"
