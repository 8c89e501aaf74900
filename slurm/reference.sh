#!/usr/bin/env bash
# The log-probs of a data set under the reference model, once, for any layout. In the repository's root:
#
#   MODEL=runs/fusesft-llama8b/hf DATASET=runs/po/dataset RUN=runs/po sbatch -N 2 slurm/reference.sh
#
# Writes RUN/reference (and RUN/model, the checkpoint), which fusepo_llama8b.sh with the same RUN finds. Further
# arguments go to `megafuse reference`.
# Submitted again, or requeued (before its time limit, after a crash), it goes on where it stopped. What every script
# knows besides (RUN, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=megafuse-reference
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
DATASET=${DATASET:-} # folder that megafuse build has made; RUN/dataset where it is empty
TP=${TP:-4} PP=${PP:-1} # tensor- and pipeline-parallel ranks; data parallel is what is left
VPP=${VPP:-1} CP=${CP:-1} EP=${EP:-1} # chunks a pipeline stage, context- and expert-parallel ranks: docs/layouts.md
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
layout
DATASET=${DATASET:-$RUN/dataset}
[ -f "$DATASET/manifest.json" ] || refuse "DATASET $DATASET is no data set: set DATASET to what megafuse build has made"
check reference --out "$RUN/reference" --model.path "$RUN/model" --data.dataset "$DATASET" "${LAYOUT[@]}" "$@"
check_model
check_nodes

import_model
reference "$DATASET" "$@"
say "done: $RUN/reference"
