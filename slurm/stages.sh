# shellcheck shell=bash disable=SC2034  # the variables are for the scripts that source this file
# What the sbatch scripts share; source it after MEGAFUSE_ROOT is set. A stage is a command whose output appears whole
# or not at all, so that "its output exists" means "it is finished".

: "${MODEL:?set MODEL to the Hugging Face folder of the target model}"
: "${DATA:?set DATA to the scored answers, .jsonl or .jsonl.gz}"
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

say() { echo "[$(date +%FT%T)] job ${SLURM_JOB_ID:-?}.${SLURM_RESTART_COUNT:-0}: $*"; }

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
  LAYOUT=(--parallel.tensor "$1" --parallel.pipeline "$2" --parallel.virtual_pipeline "${VPP:-1}"
    --parallel.context "${CP:-1}" --parallel.expert "${EP:-1}")
  if [ "$1" -gt 1 ]; then LAYOUT+=(--parallel.sequence); else LAYOUT+=(--parallel.no_sequence); fi
}

# every_node COMMAND...: `megafuse COMMAND...` on all GPUs of all nodes; a failure anywhere ends the step with its code
every_node() {
  STAGE=$((STAGE + 1))
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 \
    "$MEGAFUSE_ROOT/slurm/node.sh" "$@"
}

# newest_checkpoint RUN_FOLDER: its last complete checkpoint; unfinished ones end in .tmp
newest_checkpoint() {
  local all=("$1"/checkpoints/step_????????)
  [ -d "${all[-1]}" ] || { echo "no checkpoint in $1/checkpoints" >&2; return 1; }
  echo "${all[-1]}"
}
