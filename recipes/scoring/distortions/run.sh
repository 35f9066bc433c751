#!/usr/bin/env bash
# Trains two small scoring models on distorted photos and scores crops of other photos. It takes
# minutes on a CPU. `run.sh --quick` runs the same commands with a few steps, without a useful model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

run=runs/distortions count=12000
steps=()
if [ "${1:-}" = "--quick" ]; then
    run=${2:-runs/distortions-quick} count=200
    steps=(max_steps=4 warmup_steps=1 save_steps=null)
fi
recipes=recipes/scoring/distortions
rm -rf "$run"

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

heading "1/4  Distort photos, and convert the table of scores to training rows"
python $recipes/data.py "$run" "$count"
owl2 data convert opinion_scores "$run" "$run/train.jsonl" split_column=split check_images="$run"

heading "2/4  Create a model with random weights"
sed "s#runs/distortions#$run#" $recipes/sizes.yaml > "$run/sizes.yaml"
owl2 init --llm fresh --vision fresh --config "$run/sizes.yaml" --output "$run/start"
python $recipes/init_dct.py "$run/start" "$run/images/train"

# The prompt of the training rows. Large models also answer the published one.
prompt='USER: <|image|>
How would you rate the quality of this image? ASSISTANT: The quality of the image is'
# config.json of the second model names the loss of DeQA-Score.
declare -A method=([levels]="--method q-align" [soft_labels]="")
for recipe in levels soft_labels; do
    heading "3/4  Train: $recipe"
    owl2 train "$recipes/$recipe.yaml" model="$run/start" output="$run/$recipe" \
        data.0.file="$run/train.jsonl" data.0.images="$run" "${steps[@]}"
    heading "4/4  Score the held-out photos: $recipe"
    owl2 rate "$run/images/test" --model "$run/$recipe/model" ${method[$recipe]} \
        --prompt-form "$prompt" --output-file "$run/$recipe/scores.jsonl"
    python $recipes/agreement.py "$run/$recipe/scores.jsonl" "$run/mos.csv"
done
