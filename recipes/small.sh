#!/usr/bin/env bash
# The shipped recipes themselves, for some steps each, with a tiny model and data that are at hand:
# paper/stage1, paper/stage2 after it, finetune/full, finetune/lora and finetune/qlora. About a
# minute on two cores. Nothing is learned; it shows that the recipes run, plan, stop and are saved.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Steps this small take longer in several threads than in one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run=${1:-runs/small}
rm -rf "$run"
# What is small about it: over the recipe's own, the same for all of them.
small=(
    image_size=null max_length=96 batch_size=8 gradient_accumulation_steps=2 dtype=float32
    max_steps=4 warmup_steps=1 save_steps=null logging_steps=1 dataloader_num_workers=0
)
images='[{dataset: easy_vqa, style: captions, count: 64}]'
mixture='[{name: one, dataset: easy_vqa, style: joined, count: 40}, {name: two, dataset: easy_vqa, style: captions, count: 24}]'
own=("data.0.file=$run/folder/train.json" "data.0.images=$run/folder")

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

owl2 init --llm fresh --vision fresh --sizes recipes/easy_vqa/sizes.yaml --output "$run/start"
python recipes/finetune/example_folder.py "$run/folder"

say "The paper's stage 1"
owl2 train recipes/paper/stage1.yaml "${small[@]}" model="$run/start" output="$run/stage1" data="$images"

say "The paper's stage 2, from there"
owl2 train recipes/paper/stage2.yaml "${small[@]}" model="$run/stage1/model" output="$run/stage2" data="$mixture"

for recipe in full lora qlora; do
    if [ "$recipe" = qlora ] && ! python -c 'import bitsandbytes' 2>/dev/null; then
        say "Fine-tuning, qlora: left out, as bitsandbytes is not installed"
        continue
    fi
    say "Fine-tuning, $recipe: what it would take, and some steps"
    owl2 plan "recipes/finetune/$recipe.yaml" "${small[@]}" model="$run/start" "${own[@]}" --gpus 0
    owl2 train "recipes/finetune/$recipe.yaml" "${small[@]}" model="$run/start" output="$run/$recipe" "${own[@]}"
done
