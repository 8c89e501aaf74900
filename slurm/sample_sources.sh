#!/usr/bin/env bash
# The responses of the source models: an array, one source a task. In the repository's root:
#
#   PROMPTS=prompts.jsonl SOURCES='gemma-2-27b=/models/gemma-2-27b-it qwen2.5-72b=/models/Qwen2.5-72B-Instruct' \
#     sbatch --array=0-1 slurm/sample_sources.sh
#
# A name of `megafuse sample list` brings the papers' sampling parameters. Writes RUN/NAME.jsonl.gz. Further
# arguments go to `megafuse sample`: ... sample_sources.sh --n 5
# Submitted again, or requeued (before its time limit, after a crash), it goes on where it stopped. What every script
# knows besides (RUN, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=megafuse-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
: "${PROMPTS:?set PROMPTS to the prompts, .jsonl or .jsonl.gz, wildcards allowed}"
: "${SOURCES:?set SOURCES to NAME=FOLDER (vLLM on this node) or NAME=URL (a server), one a task, by spaces}"
TP=${TP:-${SLURM_GPUS_ON_NODE:-}} # GPUs that share one source: those that Slurm gives
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
# shellcheck disable=SC2206
sources=($SOURCES)
task=${SLURM_ARRAY_TASK_ID:-none}
[[ $task != none && $task -lt ${#sources[@]} ]] ||
  refuse "task $task of ${#sources[@]} SOURCES: sbatch --array=0-$((${#sources[@]} - 1))"
name=${sources[task]%%=*} place=${sources[task]#*=}
case $place in
  "$name") refuse "SOURCES: $name is not NAME=FOLDER or NAME=URL" ;;
  http*) engine=(--engine server --base_url "$place") ;;
  *)
    [ -f "$place/config.json" ] || refuse "SOURCES: $place has no config.json: set a Hugging Face folder, or a URL"
    [[ ${TP:-0} -ge 1 && $TP -le ${SLURM_GPUS_ON_NODE:-0} ]] ||
      refuse "TP ${TP:-0}, but Slurm gives ${SLURM_GPUS_ON_NODE:-0} GPUs: set TP, or sbatch --gres=gpu:N"
    engine=(--engine vllm --model "$place" --tensor_parallel "$TP")
    ;;
esac
check_files PROMPTS
sample=(sample --prompts "${FILES[@]}" --source "$name" --output "$RUN/$name.jsonl.gz" "${engine[@]}" "$@")
check "${sample[@]}"

RUN=$RUN/$name # each task counts its own restarts
CHUNKS=$RUN.jsonl.gz.chunks
mkdir -p "$RUN"
if todo "sample $name" "$RUN.jsonl.gz"; then here "${sample[@]}"; fi
say "done: $RUN.jsonl.gz"
