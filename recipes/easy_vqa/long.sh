#!/usr/bin/env bash
# Trains the model of the demo for longer. It takes less than an hour on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
recipes=recipes/easy_vqa
owl2 init --llm fresh --vision fresh --config $recipes/sizes.yaml --output runs/long/start
owl2 train $recipes/long_stage1.yaml
owl2 train $recipes/long_stage2.yaml
owl2 eval --model runs/long/model --tasks easy_vqa --prompt short --no-image-baseline --output runs/long/eval
