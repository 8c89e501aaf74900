#!/usr/bin/env bash
# The whole way as a chain of jobs, each of which begins when those before it have succeeded: the target is converted,
# the sources answer, answers are scored, two data sets are built, FuseSFT, reference log-probs, FusePO, and the model
# is exported and verified. Not for sbatch: run it where you submit jobs. Arguments are options of sbatch, for all:
#
#   MODEL=/models/Llama-3.1-8B-Instruct PROMPTS=prompts.jsonl REWARD_MODEL=/models/ArmoRM \
#     SOURCES='gemma-2-27b=/models/gemma-2-27b-it qwen2.5-72b=/models/Qwen2.5-72B-Instruct' \
#     bash slurm/pipeline.sh --time=12:00:00
#
# It begins with what is given: PROMPTS and SOURCES, or RESPONSES, or DATA. The model will be RUN/fusepo/hf. Variables
# of the other scripts (TP, HEALTH, IMAGE ...) reach all of them. Prints the jobs, a line each: name and id.
# shellcheck disable=SC2086  # variables of several arguments are meant to be split
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
PROMPTS=${PROMPTS:-} SOURCES=${SOURCES:-} # as in sample_sources.sh
RESPONSES=${RESPONSES:-} # as in score.sh, with REWARD and REWARD_MODEL
DATA=${DATA:-} # scored answers, as in fusesft_llama8b.sh
RUN=${RUN:-runs/pipeline} # folder of everything
NODES=${NODES:-1} # for FuseSFT, reference and FusePO
SFT=${SFT:-slurm/fusesft_llama8b.sh} PO=${PO:-slurm/fusepo_llama8b.sh} # the two training scripts
SAMPLE_ARGS=${SAMPLE_ARGS:-} SCORE_ARGS=${SCORE_ARGS:-} # further arguments of `megafuse sample` and `score`
SFT_BUILD=${SFT_BUILD:-} PO_BUILD=${PO_BUILD:-} # of `megafuse build` in each stage
SFT_ARGS=${SFT_ARGS:-} PO_ARGS=${PO_ARGS:-} # of `megafuse train` in each stage
LOSS=${LOSS:-ln_dpo} # of FusePO, as in fusepo_llama8b.sh

refuse() { echo "refused: $*" >&2; exit 2; }
[ -f "$MODEL/config.json" ] || refuse "MODEL $MODEL has no config.json: set MODEL to a Hugging Face folder"
[ -n "$DATA$RESPONSES" ] || { [ -n "$PROMPTS" ] && [ -n "$SOURCES" ]; } ||
  refuse "nothing to begin with: set PROMPTS and SOURCES, or RESPONSES, or DATA"
for file in ${DATA:-${RESPONSES:-$PROMPTS}}; do
  [ -f "$file" ] || refuse "$file is not there: set DATA, RESPONSES or PROMPTS to files"
done
work=$(realpath -m "$RUN") options=("$@")
export LOSS

# submit NAME IDS ARGUMENTS...: sbatch that waits for the jobs IDS (A:B); leaves its id in variable NAME
submit() {
  local after=()
  # without kill-on-invalid-dep a job whose predecessor failed would wait for ever
  [ -z "$2" ] || after=(--dependency="afterok:$2" --kill-on-invalid-dep=yes)
  printf -v "$1" %s "$(sbatch --parsable "${after[@]}" "${options[@]}" "${@:3}")"
  echo "$1 ${!1}"
}

sample="" score="" convert="" build_sft="" build_po="" fusesft="" reference="" fusepo=""
if [ -z "$DATA$RESPONSES" ]; then
  words=$(wc -w <<<"$SOURCES")
  RUN=$work/responses submit sample "" --array=0-$((words - 1)) slurm/sample_sources.sh $SAMPLE_ARGS
  for source in $SOURCES; do RESPONSES+="$work/responses/${source%%=*}.jsonl.gz "; done
fi
if [ -z "$DATA" ]; then
  RUN=$work RESPONSES=$RESPONSES submit score "$sample" slurm/score.sh $SCORE_ARGS
  DATA=$work/scored.jsonl.gz
fi
export DATA
ACTION=import SRC=$MODEL DST=$work/fusesft/model RUN=$work/convert submit convert "" slurm/convert.sh
RUN=$work/fusesft LOSS=sft BUILD=$SFT_BUILD submit build_sft "$score" slurm/build.sh
RUN=$work/fusepo BUILD=$PO_BUILD submit build_po "$score" slurm/build.sh
RUN=$work/fusesft BUILD=$SFT_BUILD submit fusesft "$convert:$build_sft" -N "$NODES" "$SFT" $SFT_ARGS
export MODEL=$work/fusesft/hf # the reference, too
RUN=$work/fusepo submit reference "$fusesft:$build_po" -N "$NODES" slurm/reference.sh
RUN=$work/fusepo BUILD=$PO_BUILD submit fusepo "$reference" -N "$NODES" "$PO" $PO_ARGS
ACTION=export SRC=$work/fusepo/train DST=$work/fusepo/hf RUN=$work/convert submit export "$fusepo" slurm/convert.sh
echo "submitted; the model will be $work/fusepo/hf" >&2
