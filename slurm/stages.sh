# shellcheck shell=bash disable=SC2034  # the variables are for the scripts that source this file
# What the sbatch scripts share; source it after MEGAFUSE_ROOT is set. A stage is a command whose output appears whole
# or not at all, so that "its output exists" means "it is finished".
#
# A job ends in one of these ways (exit code):
#   0        all stages are finished
#   85, ...  asked to stop before the time limit (USR1), hung (75), or crashed: requeued, and the run goes on from its
#            last checkpoint. After MAX_RESTARTS restarts without a new checkpoint it stops with the last exit code.
#   2 3 4    configuration, damaged data, full disk; 71 72 a node's GPUs, its file system; 86 87 numbers that cannot be
#            trusted: it stops, because another start would end in the same way
#   143      scancel: it stops for good

: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
: "${DATA:?set DATA to the scored answers, .jsonl or .jsonl.gz}"
MAX_RESTARTS=${MAX_RESTARTS:-3}
COMMENT_SECONDS=${COMMENT_SECONDS:-30} # between updates of the job's comment: squeue -o "%i %j %T %k"
# sbatch --export=NONE would otherwise empty the environment of the steps too
unset SLURM_EXPORT_ENV
export PYTHONSAFEPATH=1 # a folder called kernels/ in the working directory must never answer `import kernels`
cd "$MEGAFUSE_ROOT" || exit
command -v megafuse >/dev/null || export PATH="$MEGAFUSE_ROOT/.venv/bin:$PATH"
command -v megafuse >/dev/null || { echo "no megafuse on PATH: activate its environment, or run make venv" >&2; exit 1; }

RUN=$(realpath -m "${RUN:-runs/${SLURM_JOB_NAME:-megafuse}}")
export RUN STAGE=0
mkdir -p "$RUN"
PRESETS=$MEGAFUSE_ROOT/megafuse/config/presets
# DATA holds wildcards, BUILD several words: both are meant to be split
# shellcheck disable=SC2206
INPUTS=($DATA)
# shellcheck disable=SC2206
BUILD_ARGS=(${BUILD:-})
asked="" child="" graceful=""

say() { echo "[$(date +%FT%T)] job ${SLURM_JOB_ID:-?}.${SLURM_RESTART_COUNT:-0}: $*"; }
refuse() { echo "refused: $*" >&2; exit 2; }

# todo NAME OUTPUT: whether the stage has to run
todo() {
  if [ -e "$2" ]; then
    say "$1: $2 is there"
    return 1
  fi
  say "$1"
}

# layout TP PP: the arguments for a parallel layout; the rarer parts of it from VPP, CP and EP
layout() {
  local ranks=$(($1 * $2 * ${CP:-1})) world=$((SLURM_JOB_NUM_NODES * ${NPROC:-${SLURM_GPUS_ON_NODE:-8}}))
  [ $((world % ranks)) = 0 ] || refuse "TP $1 x PP $2 x CP ${CP:-1} = $ranks ranks do not divide the $world GPUs of" \
    "$SLURM_JOB_NUM_NODES nodes; set TP, PP or CP, or sbatch -N"
  LAYOUT=(--parallel.tensor "$1" --parallel.pipeline "$2" --parallel.virtual_pipeline "${VPP:-1}"
    --parallel.context "${CP:-1}" --parallel.expert "${EP:-1}")
  if [ "$1" -gt 1 ]; then LAYOUT+=(--parallel.sequence); else LAYOUT+=(--parallel.no_sequence); fi
}

# check_inputs: the folders and files that the job begins with
check_inputs() {
  [ -e "$RUN/model/manifest.json" ] || [ -f "$MODEL/config.json" ] ||
    refuse "MODEL $MODEL has no config.json: set MODEL to a Hugging Face folder that this node sees"
  local file
  [ -e "$RUN/dataset/manifest.json" ] || for file in "${INPUTS[@]}"; do
    [ -f "$file" ] || refuse "DATA $file is not there: set DATA to scored answers that this node sees"
  done
}

# check_config PRESET ARGUMENTS...: would `megafuse train` take them? Typos are answered with the nearest name.
check_config() {
  megafuse train "$@" --run_dir "$RUN/train" --model.path "$RUN/model" --data.dataset "$RUN/dataset" \
    "${LAYOUT[@]}" --print_config >/dev/null || refuse "the arguments of megafuse train (see above)"
}

# check_nodes: every node has its GPUs and sees RUN; seconds, before anything long begins
check_nodes() {
  echo "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" >"$RUN/.canary"
  local code=0
  one_fails_all=0 on_nodes check || code=$? # each node has its say, and the code stays what it is
  [ "$code" = 0 ] || { say "a node was refused (see above)"; exit "$code"; }
}

on_nodes() {
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --kill-on-bad-exit="${one_fails_all:-1}" --wait=60 \
    "$MEGAFUSE_ROOT/slurm/node.sh" "$@"
}

# every_node COMMAND...: `megafuse COMMAND...` on all GPUs of all nodes
every_node() {
  [ -z "$asked" ] || settle 0
  STAGE=$((STAGE + 1))
  rm -f "$RUN/train/stop" "$RUN/train/outcome.json"
  [ "$1" != train ] || graceful=yes
  tell_progress </dev/null >/dev/null 2>&1 &
  local teller=$! code=0
  on_nodes "$@" &
  await $! || code=$?
  kill "$teller" 2>/dev/null || true
  graceful=""
  settle "$code"
}

# here COMMAND...: a command on this node, which a signal may interrupt
here() {
  local code=0
  [ -z "$asked" ] || settle 0
  "$@" &
  await $! || code=$?
  settle "$code"
}

# await PID: its exit code, whatever signals arrive meanwhile (each ends bash's own `wait` early)
await() {
  local code
  child=$1
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  return "$code"
}

# Slurm sends USR1 before the time limit (sbatch --signal). Training saves within a step; anything else is begun again.
on_usr1() {
  asked=AGAIN
  say "asked to stop (USR1)"
  if [ -n "$graceful" ]; then
    mkdir -p "$RUN/train"
    echo AGAIN >"$RUN/train/stop"
    scancel --signal=USR1 "$SLURM_JOB_ID" || true # the steps' processes, not this script
  elif [ -n "$child" ]; then
    kill -TERM "$child" || true
  fi
}
on_term() {
  asked=END
  say "asked to end (TERM)"
  [ -z "$graceful" ] || echo END >"$RUN/train/stop"
  [ -n "$graceful" ] || [ -z "$child" ] || kill -TERM "$child" || true
}
trap on_usr1 USR1
trap on_term TERM

# settle CODE: go on after a stage that is finished; otherwise end the job, or requeue it
settle() {
  local code=$1 told
  # torchrun and srun flatten exit codes; what the ranks wrote is the first cause
  told=$(sed -n 's/.*"code": \([0-9]*\),.*"job": "'"$SLURM_JOB_ID"'",.*/\1/p' "$RUN/train/outcome.json" 2>/dev/null ||
    true)
  code=${told:-$code}
  [ "$code" != 0 ] || [ -n "$asked" ] || return 0
  if [ "$asked" = END ]; then code=143; fi
  case $code in
    2 | 3 | 4 | 71 | 72 | 86 | 87) say "ended with exit code $code"; exit "$code" ;;
    0) code=85 ;;
  esac
  # 143 by itself says nothing: after a crash srun ends the other ranks with it. And a job that Slurm is ending (scancel,
  # a dead node) must not be requeued from here: that would revive a cancelled one.
  case $asked-$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p') in
    END-* | *-CANCELLED | *-COMPLETING | *-NODE_FAIL | *-PREEMPTED)
      say "ended by Slurm, exit code $code"
      exit "$code"
      ;;
  esac
  [ "$code" != 143 ] || code=1 # the crash's own code is lost
  again "$code"
}

# again CODE: requeue this job, unless MAX_RESTARTS restarts have brought no new checkpoint
again() {
  local progress tries=1 job before count
  progress=$STAGE-$(basename "$(newest_checkpoint "$RUN/train" 2>/dev/null || echo none)")
  if read -r job before count 2>/dev/null <"$RUN/restarts" && [ "$job $before" = "$SLURM_JOB_ID $progress" ]; then
    tries=$((count + 1))
  fi
  echo "$SLURM_JOB_ID $progress $tries" >"$RUN/restarts"
  if [ "$tries" -gt "$MAX_RESTARTS" ]; then
    say "exit code $1; $MAX_RESTARTS restarts brought no new checkpoint (stage and checkpoint: $progress)"
    exit "$1"
  fi
  say "exit code $1; requeue, try $tries of $MAX_RESTARTS from $progress"
  trap '' TERM USR1
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 120; fi # ended here by the requeue
  say "not requeued; submit the job again, and it goes on"
  exit "$1"
}

# tell_progress: the step in the job's comment, now and then
tell_progress() {
  local text
  while sleep "$COMMENT_SECONDS"; do
    text=$(sed -n 's/.*"step": \([0-9]*\), "total": \([0-9]*\).*/step \1 of \2/p' "$RUN/train/heartbeat.json")
    [ -z "$text" ] || scontrol update JobId="$SLURM_JOB_ID" Comment="$text"
  done
}

# enter FOLDER: work there from now on
enter() {
  RUN=$1
  mkdir -p "$RUN"
  check_nodes
}

# The stages of the recipes. build_data ARGUMENTS...: the data set from DATA
build_data() {
  if todo build "$RUN/dataset/manifest.json"; then
    here megafuse build --inputs "${INPUTS[@]}" --output "$RUN/dataset" --tokenizer "$MODEL" --max_length 2048 "$@" \
      "${BUILD_ARGS[@]}"
  fi
  if todo import "$RUN/model/manifest.json"; then
    here megafuse convert import "$MODEL" "$RUN/model"
  fi
}

# reference: its log-probs, once
reference() {
  if todo reference "$RUN/hf/config.json" && ! grep -qs '"complete": true' "$RUN/reference/manifest.json"; then
    every_node reference --out "$RUN/reference" --model.path "$RUN/model" \
      --data.dataset "$RUN/dataset" --data.max_row_tokens 16384 "${LAYOUT[@]}"
  fi
}

# train_and_export PRESET ARGUMENTS...: training, and the model as a Hugging Face folder
train_and_export() {
  local newest
  if todo train "$RUN/hf/config.json"; then
    every_node train "$1" --run_dir "$RUN/train" --model.path "$RUN/model" --data.dataset "$RUN/dataset" \
      "${LAYOUT[@]}" "${@:2}"
  fi
  if todo export "$RUN/hf/config.json"; then
    newest=$(newest_checkpoint "$RUN/train") # apart: a failure inside an argument would go unseen
    here megafuse convert export "$newest" "$RUN/hf"
  fi
  say "done: $RUN/hf"
}

# newest_checkpoint RUN_FOLDER: its last complete checkpoint; unfinished and damaged ones have another ending
newest_checkpoint() {
  local all=("$1"/checkpoints/step_????????)
  [ -d "${all[-1]}" ] || { echo "no checkpoint in $1/checkpoints" >&2; return 1; }
  echo "${all[-1]}"
}
