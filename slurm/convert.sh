#!/usr/bin/env bash
# Hugging Face folder <-> Megatron checkpoint, and the proof that both are the same model; no GPUs. In the repository's
# root:
#
#   SRC=/models/Llama-3.1-8B-Instruct DST=runs/po/model sbatch slurm/convert.sh
#   ACTION=export SRC=runs/po/train DST=runs/po/hf sbatch slurm/convert.sh
#
# Further arguments go to `megafuse convert import` or `export`.
# Submitted again, or requeued (before its time limit, after a crash), it goes on where it stopped. What every script
# knows besides (RUN, MAX_RESTARTS, IMAGE ...): top of stages.sh, docs/slurm.md.
#SBATCH --job-name=megafuse-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# not $0: Slurm runs a copy of this file from its spool folder
export MEGAFUSE_ROOT=${MEGAFUSE_ROOT:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
: "${SRC:?set SRC to a Hugging Face folder, or for ACTION=export to a checkpoint or a run folder of training}"
: "${DST:?set DST to the folder that is made, or for ACTION=verify compared}"
ACTION=${ACTION:-import} # import | export | verify
UPTO=${UPTO:-bits} # verify up to: none | plan | bits | load | save | logits; from load on the model must fit this node
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
case $ACTION in
  import) needs=config.json makes=manifest.json ;;
  export)
    # a run folder stands for its newest checkpoint
    if [ -d "$SRC/checkpoints" ]; then SRC=$(newest_checkpoint "$SRC") || refuse "SRC: set it to a checkpoint"; fi
    needs=manifest.json makes=config.json
    ;;
  verify) needs="" makes="" ;;
  *) refuse "ACTION $ACTION: set it to import, export or verify" ;;
esac
[ -e "$SRC/$needs" ] || refuse "SRC $SRC has no $needs: set SRC to what ACTION=$ACTION begins with"
[ "$ACTION" != verify ] || [ -d "$DST" ] || refuse "DST $DST is not there: set DST to what SRC is compared with"
[ "$UPTO" = none ] || check convert verify "$SRC" "$DST" --upto "$UPTO"
[ "$ACTION" = verify ] || check convert "$ACTION" "$SRC" "$DST" "$@"

if [ "$ACTION" != verify ] && todo "$ACTION" "$DST/$makes"; then here convert "$ACTION" "$SRC" "$DST" "$@"; fi
if [ "$UPTO" != none ]; then here convert verify "$SRC" "$DST" --upto "$UPTO"; fi
say "done: $DST"
