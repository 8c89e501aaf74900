# shellcheck shell=bash
# Both stages of FuseChat-3.0; sourced by fusechat3_TARGET.sh, which sets the paper's values for its target.
# shellcheck source=slurm/stages.sh
source "$MEGAFUSE_ROOT/slurm/stages.sh"
base=$RUN
sft=("$PRESETS/fusesft_llama8b.toml" --optim.lr "$SFT_LR")
po=("$PRESETS/fusepo_llama8b.toml" --optim.lr "$PO_LR" --loss.name "$LOSS" --loss.beta "$BETA")
layout "$TP" "${PP:-1}"
check_inputs
check_config "${sft[@]}"
check_config "${po[@]}"

enter "$base/sft"
build_data --kind sft --selection single_best
train_and_export "${sft[@]}"

MODEL=$base/sft/hf # the reference, too
enter "$base/po"
build_data --kind pair --min_gap 0.01 --max_gap 0.1
reference
train_and_export "${po[@]}" --reference.path "$RUN/reference"
