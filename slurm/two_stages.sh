# shellcheck shell=bash disable=SC2154
# FuseSFT, then FusePO of its result, in one job; sourced by the scripts of whole recipes. They set SFT_LR, PO_LR, LOSS,
# BETA and the layout; sft_data and po_data, arguments of `megafuse build`; train, arguments of both trainings.
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
base=$RUN
loss
sft=("$PRESETS/fusesft_llama8b.toml" --optim.lr "$SFT_LR" "${train[@]}")
po=("$PRESETS/fusepo_llama8b.toml" --optim.lr "$PO_LR" "${LOSS_ARGS[@]}" "${train[@]}")
layout
[[ -e $base/sft/dataset/manifest.json && -e $base/po/dataset/manifest.json ]] || check_files DATA
check_train "${sft[@]}"
check_train "${po[@]}"
[ -e "$base/sft/model/manifest.json" ] || check_model

enter "$base/sft"
build_data --kind sft "${sft_data[@]}"
import_model
train_and_export "${sft[@]}"

MODEL=$base/sft/hf # the reference, too
enter "$base/po"
build_data "${KIND[@]}" "${po_data[@]}"
import_model
reference "$RUN/dataset"
train_and_export "${po[@]}" --reference.path "$RUN/reference"
