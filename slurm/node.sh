#!/usr/bin/env bash
# Runs once on every node, under srun: `node.sh COMMAND...` starts `megafuse COMMAND...` on each of the node's GPUs.
# Every Slurm script shares it. Set RUN to the run folder; NPROC and PORT override what is derived here.
set -euo pipefail
restarts=${SLURM_RESTART_COUNT:-0}
stage=${STAGE:-0}
procs=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}

[ -d "$RUN" ] || { echo "$(hostname): no folder $RUN here; RUN must be on a file system that all nodes see" >&2; exit 1; }
if [ -z "${NPROC:-}" ] && command -v nvidia-smi >/dev/null; then
  seen=$(nvidia-smi -L | grep -c '^GPU ' || true)
  [ "$seen" -ge "$procs" ] || { echo "$(hostname): $seen of $procs GPUs answer; exclude this node" >&2; exit 1; }
fi

# The first node leads. Its name may not resolve everywhere; the controller knows its address.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
getent hosts "$head" >/dev/null || head=$(scontrol -o show node "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# Below the ephemeral range (32768), so that no outgoing connection holds it; another one for each job, restart, stage.
port=${PORT:-$((20000 + (SLURM_JOB_ID * 8 + restarts * 4 + stage) % 12000))}

export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron-core: communication is queued in order
# No restarts by torchrun: a stage that failed is started again by Slurm or by hand, and goes on by itself.
exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$procs" --max-restarts=0 --rdzv-backend=c10d \
  --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.$restarts.$stage" -m megafuse "$@"
