#!/usr/bin/env bash
# Runs the recipes for a few steps each, with a tiny model and local data: paper/stage1,
# paper/stage2, finetune/full, finetune/lora, and finetune/qlora. It takes about a minute on two cores.
# It shows that the recipes train, save, and can be estimated. The models learn nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One thread is faster than several for such small steps.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run=${1:-runs/small}
rm -rf "$run"
# Settings that replace those of every recipe.
small=(
    image_size=null max_length=96 batch_size=8 gradient_accumulation_steps=2 dtype=float32
    max_steps=4 warmup_steps=1 save_steps=null logging_steps=1 dataloader_num_workers=0
)
images='[{dataset: easy_vqa, style: captions, count: 64}]'
mixture='[{name: one, dataset: easy_vqa, style: joined, count: 40}, {name: two, dataset: easy_vqa, style: captions, count: 24}]'
own=("data.0.file=$run/folder/train.json" "data.0.images=$run/folder")

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

owl2 init --llm fresh --vision fresh --config recipes/easy_vqa/sizes.yaml --output "$run/start"
python recipes/finetune/example_folder.py "$run/folder"

heading "Stage 1 of the paper"
owl2 train recipes/paper/stage1.yaml "${small[@]}" model="$run/start" output="$run/stage1" data="$images"

heading "Stage 2 of the paper"
owl2 train recipes/paper/stage2.yaml "${small[@]}" model="$run/stage1/model" output="$run/stage2" data="$mixture"

for recipe in full lora qlora; do
    if [ "$recipe" = qlora ] && ! python -c 'import bitsandbytes' 2>/dev/null; then
        heading "Fine-tuning, qlora: skipped, because bitsandbytes is not installed"
        continue
    fi
    heading "Fine-tuning, $recipe: estimate and train"
    owl2 plan "recipes/finetune/$recipe.yaml" "${small[@]}" model="$run/start" "${own[@]}" --gpus 0
    owl2 train "recipes/finetune/$recipe.yaml" "${small[@]}" model="$run/start" output="$run/$recipe" "${own[@]}"
done
