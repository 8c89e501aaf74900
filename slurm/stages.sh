# shellcheck shell=bash disable=SC2034  # the variables are for the scripts that source this file
# What the sbatch scripts share; source it after MEGAFUSE_ROOT and the script's own variables are set. A stage is a
# command whose output appears whole or not at all, so that "its output exists" means "it is finished".
#
# A job ends in one of these ways (exit code):
#   0        all stages are finished
#   85, ...  asked to stop before the time limit (USR1), hung (75), or crashed: requeued, and the run goes on from its
#            last checkpoint. After MAX_RESTARTS restarts that bring nothing new it stops with the last exit code.
#   2 3 4    configuration, damaged data, full disk; 71 72 a node's GPUs, its file system; 86 87 numbers that cannot be
#            trusted: it stops, because another start would end in the same way
#   143      scancel: it stops for good

# What every script knows, with its default. The scripts' own are at their tops; docs/slurm.md has them all in a table.
RUN=${RUN:-runs/${SLURM_JOB_NAME:-megafuse}} # folder for everything that is made, on a file system that all nodes see
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}} # processes a node: the GPUs that Slurm gives
HEALTH=${HEALTH:-on} # on | off: look first whether the GPUs of every node answer, have memory errors, are in use
MAX_RESTARTS=${MAX_RESTARTS:-3} # requeues that bring nothing new before the job gives up
COMMENT_SECONDS=${COMMENT_SECONDS:-30} # between updates of the job's comment: squeue -o "%i %j %T %k"
IMAGE=${IMAGE:-} # container image that holds megafuse (srun --container-image, pyxis); without one the PATH has it
MOUNTS=${MOUNTS:-} # what the container sees besides MEGAFUSE_ROOT and RUN: /models:/models,/data:/data

# sbatch --export=NONE would otherwise empty the environment of the steps too
unset SLURM_EXPORT_ENV
export PYTHONSAFEPATH=1 # a folder called kernels/ in the working directory must never answer `import kernels`
cd "$MEGAFUSE_ROOT" || exit

say() { echo "[$(date +%FT%T)] job ${SLURM_JOB_ID:-?}.${SLURM_RESTART_COUNT:-0}: $*"; }
refuse() { echo "refused: $*" >&2; exit 2; }

RUN=$(realpath -m "$RUN")
export RUN NPROC HEALTH STAGE=0
mkdir -p "$RUN" || refuse "RUN $RUN cannot be made: set RUN to a folder that this job may write"
PRESETS=$MEGAFUSE_ROOT/megafuse/config/presets
megafuse=(megafuse) container=()
if [ -n "$IMAGE" ]; then
  container=(--container-image="$IMAGE" --container-workdir="$MEGAFUSE_ROOT"
    --container-mounts="$MEGAFUSE_ROOT:$MEGAFUSE_ROOT,$RUN:$RUN${MOUNTS:+,$MOUNTS}")
  megafuse=(srun --nodes=1 --ntasks=1 --overlap "${container[@]}" megafuse)
  HEAD_NODE=$("$MEGAFUSE_ROOT/slurm/node.sh" head) # there is no scontrol inside
  export HEAD_NODE
else
  command -v megafuse >/dev/null || export PATH="$MEGAFUSE_ROOT/.venv/bin:$PATH"
  command -v megafuse >/dev/null || refuse "no megafuse on PATH: activate its environment, run make venv, or set IMAGE"
fi
asked="" child="" graceful=""

# todo NAME OUTPUT: whether the stage has to run
todo() {
  if [ -e "$2" ]; then
    say "$1: $2 is there"
    return 1
  fi
  say "$1"
}

# check_gpus: as many processes a node as there are GPUs
check_gpus() {
  [ -n "$NPROC" ] || refuse "Slurm gives this job no GPUs: sbatch --gres=gpu:8, or set NPROC"
  [ "$NPROC" -le "${SLURM_GPUS_ON_NODE:-$NPROC}" ] ||
    refuse "NPROC $NPROC, but Slurm gives $SLURM_GPUS_ON_NODE GPUs a node: set NPROC, or sbatch --gres=gpu:$NPROC"
}

# layout: the arguments for the parallel layout of TP, PP, VPP, CP and EP, and whether MODEL and the GPUs can be cut so
layout() {
  check_gpus
  local ranks=$((TP * PP * CP)) world=$((SLURM_JOB_NUM_NODES * NPROC))
  [ $((world % ranks)) = 0 ] || refuse "TP $TP x PP $PP x CP $CP = $ranks ranks do not divide the $world GPUs of" \
    "$SLURM_JOB_NUM_NODES nodes; set TP, PP or CP, or sbatch -N"
  LAYOUT=(--parallel.tensor "$TP" --parallel.pipeline "$PP" --parallel.virtual_pipeline "$VPP"
    --parallel.context "$CP" --parallel.expert "$EP")
  if [ "$TP" -gt 1 ]; then LAYOUT+=(--parallel.sequence); else LAYOUT+=(--parallel.no_sequence); fi
}

# check_model: MODEL is a Hugging Face folder that can be cut so; one that is imported already has been looked at
check_model() {
  [ -e "$RUN/model/manifest.json" ] || [ -f "$MODEL/config.json" ] ||
    refuse "MODEL $MODEL has no config.json: set MODEL to a Hugging Face folder that this node sees"
  [ ! -f "$MODEL/config.json" ] || check_shape
}

# check_shape: can MODEL be cut so? Every number that does not divide is named, and the nearest layout that does
check_shape() {
  "${megafuse[@]}" doctor layout --model "$MODEL" --ranks $((SLURM_JOB_NUM_NODES * NPROC)) "${LAYOUT[@]}" ||
    refuse "this layout of MODEL $MODEL (see above); set TP, PP, VPP, CP or EP"
}

# check_files NAME: the files that variable NAME means, wildcards allowed, which become FILES
check_files() {
  # shellcheck disable=SC2206
  FILES=(${!1})
  local file
  for file in "${FILES[@]}"; do
    [ -f "$file" ] || refuse "$1 $file is not there: set $1 to files that this node sees"
  done
}

# check_data: DATA is there, or the data set that is made of it
check_data() { [ -e "$RUN/dataset/manifest.json" ] || check_files DATA; }

# check COMMAND...: would megafuse take this command line? Typos are answered with the nearest name
check() { "${megafuse[@]}" "$@" --print_config >/dev/null || refuse "the arguments of megafuse $1 (see above)"; }

# check_train PRESET ARGUMENTS...: the same for `megafuse train`
check_train() {
  check train "$@" --run_dir "$RUN/train" --model.path "$RUN/model" --data.dataset "$RUN/dataset" "${LAYOUT[@]}"
}

# loss: the arguments for LOSS, the kind of data it takes, FuseRL's alpha; FuseChat-3.0's BETA where it is empty
loss() {
  KIND=(--kind pair --alpha 5e-3)
  case $LOSS in
    sft) KIND=(--kind sft --alpha 1e-2) ;;
    ln_dpo) BETA=${BETA:-10} ;;
    dpo) BETA=${BETA:-0.01} ;;
    simpo) KIND=(--kind pair --alpha 1e-3) ;;
    rloo) KIND=(--kind rloo --alpha 5e-3) BETA=${BETA:-None} ;; # it has --loss.beta_kl instead
    wrpo) KIND=(--kind wrpo) ;;
    *) refuse "LOSS $LOSS: set it to one of sft ln_dpo dpo simpo rloo wrpo" ;;
  esac
  [ "$LOSS" = sft ] || [ -n "${BETA:-}" ] || refuse "LOSS $LOSS has no beta that a paper gives: set BETA"
  LOSS_ARGS=(--loss.name "$LOSS" --loss.beta "${BETA:-None}")
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
    --kill-on-bad-exit="${one_fails_all:-1}" --wait=60 "${container[@]}" \
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

# here COMMAND...: `megafuse COMMAND...` once, on the first node; a signal may interrupt it
here() {
  local code=0
  [ -z "$asked" ] || settle 0
  "${megafuse[@]}" "$@" &
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
  # 143 by itself says nothing: after a crash srun ends the other ranks with it. And a job that Slurm ends (scancel,
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

# again CODE: requeue this job, unless MAX_RESTARTS restarts have brought nothing new
again() {
  local progress tries=1 job before count
  progress=$STAGE-$(progress)
  if read -r job before count 2>/dev/null <"$RUN/restarts" && [ "$job $before" = "$SLURM_JOB_ID $progress" ]; then
    tries=$((count + 1))
  fi
  echo "$SLURM_JOB_ID $progress $tries" >"$RUN/restarts"
  if [ "$tries" -gt "$MAX_RESTARTS" ]; then
    say "exit code $1; $MAX_RESTARTS restarts brought nothing new ($progress)"
    exit "$1"
  fi
  say "exit code $1; requeue, try $tries of $MAX_RESTARTS from $progress"
  trap '' TERM USR1
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 120; fi # ended here by the requeue
  say "not requeued; submit the job again, and it goes on"
  exit "$1"
}

# progress: a word that changes with what is done: the newest checkpoint, or the chunks of CHUNKS
progress() {
  if [ -n "${CHUNKS:-}" ]; then
    find "$CHUNKS" -name '*.jsonl' 2>/dev/null | wc -l
  else
    basename "$(newest_checkpoint "$RUN/train" 2>/dev/null || echo none)"
  fi
}

# tell_progress: the step in the job's comment, now and then
tell_progress() {
  local text
  while sleep "$COMMENT_SECONDS"; do
    # before the first step there is no heartbeat, and Slurm's controller may be away for a moment: neither ends this
    text=$(sed -n 's/.*"step": \([0-9]*\), "total": \([0-9]*\).*/step \1 of \2/p' "$RUN/train/heartbeat.json") || continue
    [ -z "$text" ] || scontrol update JobId="$SLURM_JOB_ID" Comment="$text" || continue
  done
}

# enter FOLDER: work there from now on
enter() {
  RUN=$1
  mkdir -p "$RUN"
  check_nodes
}

# The stages of the recipes. build_data ARGUMENTS...: the data set from DATA. BUILD holds several words
build_data() {
  if todo build "$RUN/dataset/manifest.json"; then
    check_files DATA
    # shellcheck disable=SC2086
    here build --inputs "${FILES[@]}" --output "$RUN/dataset" --tokenizer "$MODEL" --max_length 2048 "$@" ${BUILD:-}
  fi
}

# import_model: MODEL as a checkpoint
import_model() {
  if todo import "$RUN/model/manifest.json"; then
    here convert import "$MODEL" "$RUN/model"
  fi
}

# reference DATASET ARGUMENTS...: its log-probs, once
reference() {
  if grep -qs '"complete": true' "$RUN/reference/manifest.json"; then
    say "reference: $RUN/reference is there"
  elif todo reference "$RUN/hf/config.json"; then
    every_node reference --out "$RUN/reference" --model.path "$RUN/model" --data.dataset "$1" \
      --data.max_row_tokens 16384 "${LAYOUT[@]}" "${@:2}"
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
    here convert export "$newest" "$RUN/hf"
  fi
  say "done: $RUN/hf"
}

# newest_checkpoint RUN_FOLDER: its last complete checkpoint; unfinished and damaged ones have another ending
newest_checkpoint() {
  local all=("$1"/checkpoints/step_????????)
  [ -d "${all[-1]}" ] || { echo "no checkpoint in $1/checkpoints" >&2; return 1; }
  echo "${all[-1]}"
}
