#!/usr/bin/env bash
# FuseSFT of Llama-3.1-8B-Instruct, from scored answers to a Hugging Face folder. In the repository's root:
#
#   MODEL=/models/Llama-3.1-8B-Instruct DATA='scored/*.jsonl.gz' sbatch -N 4 slurm/fusesft_llama8b.sh
#
# Any number of nodes (-N). Further arguments go to `megafuse train`: ... fusesft_llama8b.sh --optim.lr 7e-6
# Submitted again with the same RUN it goes on where it stopped: finished stages are skipped, training resumes. It does
# so by itself (requeue) 300 s before its time limit, after a crash, a hang, or the loss of a node; see stages.sh.
#
#   MODEL  Hugging Face folder of the target model (required)
#   DATA   scored answers: .jsonl or .jsonl.gz files, wildcards allowed (required)
#   RUN    folder for everything that is made, on a file system that all nodes see; default runs/JOBNAME
#   TP PP  tensor- and pipeline-parallel ranks; default 2 and 1. Data parallel is what is left.
#   VPP CP EP  chunks a pipeline stage, context- and expert-parallel ranks; default 1. See docs/layouts.md
#   BUILD  further arguments of `megafuse build`, for example "--max_prompts 20000"
#   NPROC  processes a node; default: the GPUs that Slurm gives
#   HEALTH  on | off: check the GPUs of every node first; default on
#   MAX_RESTARTS  requeues without a new checkpoint before the job gives up; default 3
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
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
layout "${TP:-2}" "${PP:-1}"
check_inputs
check_config "$PRESETS/fusesft_llama8b.toml" "$@"
check_nodes

build_data --kind sft --alpha 1e-2
train_and_export "$PRESETS/fusesft_llama8b.toml" "$@"
