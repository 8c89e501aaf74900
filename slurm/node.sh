#!/usr/bin/env bash
# Runs once on every node, under srun: `node.sh COMMAND...` starts `megafuse COMMAND...` on each of the node's GPUs;
# `node.sh check` only looks whether this node can do it; `node.sh head` prints the address of the first node. Every
# Slurm script shares it. Set RUN to the run folder.
#
#   NPROC   processes a node; default: the GPUs that Slurm gives
#   PORT    rendezvous port; default: from job id, restart and stage
#   HEAD_NODE  address of the first node; default: asked of Slurm
#   HEALTH  on | off: GPUs that answer, uncorrected memory errors, processes of others; default on
set -euo pipefail
restarts=${SLURM_RESTART_COUNT:-0}
stage=${STAGE:-0}
procs=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}

# refuse CODE MESSAGE: 71 this node's GPUs, 72 its file system
refuse() { echo "$(hostname): $2" >&2; exit "$1"; }

health() {
  [ "${HEALTH:-on}" = on ] && command -v nvidia-smi >/dev/null || return 0
  local seen bad busy
  seen=$(nvidia-smi -L | grep -c '^GPU ' || true)
  [ "$seen" -ge "$procs" ] || refuse 71 "$seen of $procs GPUs answer; exclude this node"
  bad=$(nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader | grep -c '^ *[1-9]' || true)
  [ "$bad" = 0 ] || refuse 71 "$bad GPUs have uncorrected memory errors; exclude this node"
  busy=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader | grep -c '^ *[0-9]' || true)
  [ "$busy" = 0 ] || refuse 71 "$busy processes are on these GPUs already; exclude this node, or set HEALTH=off"
}

if [ "$1" = check ]; then
  # the batch script has just written this file on the first node; network file systems may show it a moment later
  for _ in 1 2 3 4 5; do
    if [ "$(cat "$RUN/.canary" 2>/dev/null)" = "$SLURM_JOB_ID.$restarts" ]; then health; exit 0; fi
    sleep 1
  done
  refuse 72 "no folder $RUN as the first node sees it; RUN must be on a file system that all nodes see"
fi

# The first node leads. Its name may not resolve everywhere; the controller knows its address.
head=${HEAD_NODE:-}
if [ -z "$head" ]; then
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  getent hosts "$head" >/dev/null || head=$(scontrol -o show node "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
if [ "$1" = head ]; then
  echo "$head"
  exit
fi
# Below the ephemeral range (32768), so that no outgoing connection holds it; another one for each job, restart, stage.
port=${PORT:-$((20000 + (SLURM_JOB_ID * 8 + restarts * 4 + stage) % 12000))}

export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export MEGAFUSE_PLANNED_STOP=0 # a stop that was asked for is no failure; outcome.json says how it was
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# USR1 reaches every process of the step; torchrun would die of it, the ranks take it as "save and stop". TERM is passed
# on by Slurm to each process; this one waits for what the ranks make of it.
trap : USR1 TERM
# No restarts by torchrun: the batch script requeues, and the run goes on by itself.
(trap '' USR1
  exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$procs" --max-restarts=0 --rdzv-backend=c10d \
    --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.$restarts.$stage" -m megafuse "$@") &
ranks=$!
while :; do # a trapped signal ends `wait` early
  code=0
  wait "$ranks" || code=$?
  kill -0 "$ranks" 2>/dev/null || exit "$code"
done
