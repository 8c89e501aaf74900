#!/usr/bin/env bash
# FusePO (length-normalised DPO) of a FuseSFT'ed Llama-3.1-8B-Instruct, from scored answers to a Hugging Face folder.
# In the repository's root:
#
#   MODEL=runs/fusesft-llama8b/hf DATA='scored/*.jsonl.gz' sbatch -N 4 slurm/fusepo_llama8b.sh
#
# Any number of nodes (-N). Further arguments go to `megafuse train`: ... fusepo_llama8b.sh --optim.lr 8e-7
# Submitted again with the same RUN it goes on where it stopped: finished stages are skipped, training resumes. It does
# so by itself (requeue) 300 s before its time limit, after a crash, a hang, or the loss of a node; see stages.sh.
#
#   MODEL  Hugging Face folder of the target model, which is the reference too (required)
#   DATA   scored answers: .jsonl or .jsonl.gz files, wildcards allowed (required)
#   RUN    folder for everything that is made, on a file system that all nodes see; default runs/JOBNAME
#   TP PP  tensor- and pipeline-parallel ranks; default 4 and 1. Data parallel is what is left.
#   VPP CP EP  chunks a pipeline stage, context- and expert-parallel ranks; default 1. See docs/layouts.md
#   BUILD  further arguments of `megafuse build`, for example "--min_gap 0.01 --max_gap 0.1"
#   NPROC  processes a node; default: the GPUs that Slurm gives
#   HEALTH  on | off: check the GPUs of every node first; default on
#   MAX_RESTARTS  requeues without a new checkpoint before the job gives up; default 3
#SBATCH --job-name=fusepo-llama8b
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
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
layout "${TP:-4}" "${PP:-1}"
check_inputs
check_config "$PRESETS/fusepo_llama8b.toml" "$@"
check_nodes

build_data --kind pair --alpha 5e-3
reference
train_and_export "$PRESETS/fusepo_llama8b.toml" --reference.path "$RUN/reference" "$@"
