#!/usr/bin/env bash
# Verifiers and rewards for the responses of all sources, shared by the GPUs of all nodes. In the repository's root:
#
#   RESPONSES='runs/megafuse-sample/*.jsonl.gz' REWARD_MODEL=/models/ArmoRM sbatch slurm/score.sh
#
# Writes RUN/scored.jsonl.gz. Further arguments go to `megafuse score`: ... score.sh --batch_tokens 32768
# Submitted again, or requeued (before its time limit, after a crash), it goes on where it stopped. What every script
# knows besides (RUN, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=megafuse-score
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
: "${RESPONSES:?set RESPONSES to the responses of all sources, .jsonl or .jsonl.gz, wildcards allowed}"
REWARD=${REWARD:-armorm} # armorm | classifier | judge | correct | keep, see megafuse score --help
REWARD_MODEL=${REWARD_MODEL:-} # Hugging Face folder of the reward model; armorm and classifier need it
PROMPTS=${PROMPTS:-} # the prompts that were sampled from: responses to others are refused
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
check_gpus
case $REWARD in
  armorm | classifier) [ -f "$REWARD_MODEL/config.json" ] ||
    refuse "REWARD_MODEL '$REWARD_MODEL' has no config.json: set REWARD_MODEL to a Hugging Face folder, or REWARD" ;;
esac
prompts=()
if [ -n "$PROMPTS" ]; then
  check_files PROMPTS
  prompts=(--prompts "${FILES[@]}")
fi
check_files RESPONSES
CHUNKS=$RUN/scored.jsonl.gz.chunks
score=(score --inputs "${FILES[@]}" --output "$RUN/scored.jsonl.gz" --reward "$REWARD" "${prompts[@]}"
  ${REWARD_MODEL:+--model "$REWARD_MODEL"} "$@")
check "${score[@]}"
check_nodes

if todo score "$RUN/scored.jsonl.gz"; then every_node "${score[@]}"; fi
say "done: $RUN/scored.jsonl.gz"
