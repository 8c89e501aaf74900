#!/usr/bin/env bash
# One point of a sweep: the recipe RECIPE, then the rank accuracy of its model on prompts that no point trains on, as
# one job. `megafuse launch sweep` submits it, with the recipe's own #SBATCH options.
#
#   RECIPE      the recipe's script (required)
#   RANK_BUILD  arguments of `megafuse build` for the held-out prompts; empty: no rank accuracy
#   RANK_MODEL  further arguments of `megafuse eval`
set -euo pipefail
point=$(realpath -m "$RUN")
# the same shell: the recipe's traps stay in force for what follows
# shellcheck source=slurm/fusepo_llama8b.sh
source "$RECIPE"

[ -n "${RANK_BUILD:-}" ] || exit 0
# wildcards and several words are meant to be split
# shellcheck disable=SC2206
scored=($DATA) rank_build=($RANK_BUILD) rank_model=(${RANK_MODEL:-})
if todo "rank data set" "$point/rank/manifest.json"; then
  here build --inputs "${scored[@]}" --output "$point/rank" --tokenizer "$MODEL" --kind rank \
    --max_length 2048 "${rank_build[@]}"
fi
if todo "rank accuracy" "$point/eval/accuracy.json"; then
  every_node eval --out "$point/eval" --model.path "$RUN/hf" --data.dataset "$point/rank" --data.max_row_tokens 16384 \
    "${LAYOUT[@]}" ${rank_model[@]+"${rank_model[@]}"}
fi
say "done: $point/eval/accuracy.json"
