# shellcheck shell=bash
# FuseChat-3.0's data; sourced by fusechat3_TARGET.sh, which sets the paper's values for its target.
sft_data=(--selection single_best) po_data=(--min_gap 0.01 --max_gap 0.1) train=()
# shellcheck source=slurm/two_stages.sh
source "$MEGAFUSE_ROOT/slurm/two_stages.sh"
