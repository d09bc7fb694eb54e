#!/usr/bin/env bash
# One model and one dataset of the paper's Table 1: train OPSD and purified OPSD, evaluate the base and every checkpoint
# of both on AIME 2024, AIME 2025 and HMMT February 2025 with 12 samples per problem, and compare.
#
#   recipes/reproduce.sh <model> <data>      e.g. recipes/reproduce.sh Qwen3-8B dasd
#
# Existing data and finished runs are kept; training and evaluation continue where they stopped. Paths are relative to the
# checkout. Environment variables:
#   DRY_RUN=1    print the commands, run nothing
#   DATASET      hub id or folder to build the training data from; mathcot needs it
#   MODEL_PATH   local copy of the model's weights
#   OUTPUT       folder to write to (outputs)
#   TRAIN_ARGS   more arguments of `purified-opsd train`, e.g. "--multi_gpu --num_processes 8 --gradient_accumulation_steps 1"
#   EVAL_ARGS    more arguments of `purified-opsd evaluate`, e.g. "--vllm_tensor_parallel_size 8"
set -euo pipefail
cd "$(dirname "$0")/.."

configs=(recipes/*/purified_opsd/config_{dasd,mathcot}.yaml)
usage() {
    echo "usage: recipes/reproduce.sh <model> <data>, one of" >&2
    for config in "${configs[@]}"; do
        data=${config##*/config_}
        echo "    $(cut -d/ -f2 <<<"$config") ${data%.yaml}" >&2
    done
    exit 2
}
[ $# -eq 2 ] || usage
model=$1 data=$2
config=recipes/$model/purified_opsd/config_$data.yaml
[[ " ${configs[*]} " == *" $config "* ]] || usage
if [ "$data" = mathcot ] && [ -z "${DATASET:-}" ]; then
    echo "error: set DATASET to a hub id or a folder, because the paper gives no hub id for Math-CoT-20K (recipes/README.md)" >&2
    exit 2
fi

run() {
    echo "$*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

weights=${MODEL_PATH:-$(sed -n 's/^model_name_or_path: *//p' "$config")}
output=${OUTPUT:-outputs}
rows=$output/data/$(basename "$(sed -n 's/^dataset_name: *//p' "$config")")
evaluation=$output/$model-$data-evaluation
read -ra train_args <<<"${TRAIN_ARGS:-}"
read -ra eval_args <<<"${EVAL_ARGS:-}"

[ -f "$rows" ] || run python recipes/build_data.py "$data" --output "$rows" ${DATASET:+--dataset "$DATASET"}

for method in opsd purified; do
    target=purified resume=()
    [ $method = purified ] || target=teacher
    run_dir=$output/$model-$method-$data
    compgen -G "$run_dir/checkpoint-*/trainer_state.json" >/dev/null && resume=(--resume_from_checkpoint true)
    [ -f "$run_dir/adapter_model.safetensors" ] || run purified-opsd train --config "$config" \
        --model_name_or_path "$weights" --dataset_name "$rows" --target $target --output_dir "$run_dir" \
        "${resume[@]}" "${train_args[@]}"
done

thinking=template # R1-Distill and Olmo-3-Think always think; Qwen3 has a switch
[[ $model != Qwen3* ]] || thinking=on
run purified-opsd evaluate --model_name_or_path "$weights" \
    --checkpoints "$output/$model-opsd-$data" "$output/$model-purified-$data" \
    --benchmarks aime24 aime25 hmmt25 --num_generations 12 --thinking $thinking --output_dir "$evaluation" "${eval_args[@]}"

# The paper reports the best checkpoint of each run. All are shown here, because the best of four on the test set is biased
results=("$evaluation/$(basename "$weights")/results.json")
for method in opsd purified; do
    mapfile -t -O ${#results[@]} results \
        < <(printf '%s\n' "$evaluation/$model-$method-$data"-checkpoint-*/results.json | sort -V)
done
run purified-opsd evaluate --compare "${results[@]}" --output_dir "$evaluation/comparison"
