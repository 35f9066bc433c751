#!/usr/bin/env bash
# Creates the small model: data, vision encoder, training, quantization, model card (docs/models.md).
# Hours on two cores. `small_model.sh --quick` runs the same commands in minutes, without a useful model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

study=small_model small=() data=runs/study/data vision=runs/study/vision run=runs/small-model
if [ "${1:-}" = "--quick" ]; then
    study=quick small=(--small) run=runs/small-model-quick
    data=runs/study/small/data vision=runs/study/small/vision
fi
[ -e $data/data.json ] || python recipes/study/data.py "${small[@]}" --output $data
[ -e $vision/config.json ] || python recipes/study/vision.py "${small[@]}" --data $data --output $vision
python recipes/study/run.py recipes/small/$study.yaml --arms full
python recipes/small/package_model.py recipes/small/$study.yaml --output $run/model
