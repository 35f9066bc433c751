#!/usr/bin/env bash
# Trains two small scoring models on distorted photos, in minutes on a CPU.
#
#   run.sh                 train, and score crops of the validation photos, for the choice of settings
#   run.sh --test          score crops of the test photos, after the last choice
#   run.sh --quick [DIR]   both with a few steps, without a useful model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

run=runs/distortions count=24000 splits=(validation)
steps=()
case "${1:-}" in
--test) splits=(test) ;;
--quick)
    run=${2:-runs/distortions-quick} count=200 splits=(validation test)
    steps=(max_steps=4 warmup_steps=1 save_steps=null)
    ;;
esac
recipes=recipes/scoring/distortions

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

if [ "${1:-}" != "--test" ]; then
    rm -rf "$run"
    heading "1/4  Distort photos, and convert the table of scores to training rows"
    python $recipes/data.py "$run" "$count"
    owl2 data convert opinion_scores "$run" "$run/train.jsonl" split_column=split check_images="$run"

    heading "2/4  Create a model with random weights"
    sed "s#runs/distortions#$run#" $recipes/sizes.yaml > "$run/sizes.yaml"
    owl2 init --llm fresh --vision fresh --config "$run/sizes.yaml" --output "$run/start"
    python $recipes/init_dct.py "$run/start" "$run/images/train"

    for recipe in levels soft_labels; do
        heading "3/4  Train: $recipe"
        owl2 train "$recipes/$recipe.yaml" model="$run/start" output="$run/$recipe" \
            data.0.file="$run/train.jsonl" data.0.images="$run" "${steps[@]}"
    done
fi

# The prompt of the training rows. Large models also answer the published one.
prompt='USER: <|image|>
How would you rate the quality of this image? ASSISTANT: The quality of the image is'
# config.json of the second model names the loss of DeQA-Score.
declare -A method=([levels]="--method q-align" [soft_labels]="")
for recipe in levels soft_labels; do
    for split in "${splits[@]}"; do
        heading "4/4  Score the $split photos: $recipe"
        owl2 rate "$run/images/$split" --model "$run/$recipe/model" ${method[$recipe]} \
            --prompt-form "$prompt" --output-file "$run/$recipe/$split.jsonl"
        python $recipes/agreement.py "$run/$recipe/$split.jsonl" "$run/mos.csv"
    done
done
