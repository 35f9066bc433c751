#!/usr/bin/env bash
# The complete workflow on easy-VQA: create, train in two stages, evaluate, ask. It takes minutes on two
# cores. `demo.sh --quick` runs the same commands with a few steps in a minute, without a useful model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run=runs/demo
steps=() limit=()
if [ "${1:-}" = "--quick" ]; then
    run=runs/demo-quick
    steps=(max_steps=8 warmup_steps=2)
    limit=(--limit 64)
fi
recipes=recipes/easy_vqa
rm -rf "$run"

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

heading "1/5  Create a model with random weights and train a tokenizer"
owl2 init --llm fresh --vision fresh --config $recipes/sizes.yaml --output $run/start
owl2 info $run/start

heading "2/5  Stage 1: train the image path on captions"
owl2 train $recipes/stage1.yaml model=$run/start output=$run/stage1 "${steps[@]}"

heading "3/5  Stage 2: train all weights on questions and answers"
owl2 train $recipes/stage2.yaml model=$run/stage1/model output=$run "${steps[@]}"

heading "4/5  Evaluate on the 9,673 test questions, with and without the image"
owl2 eval --model $run/model --tasks easy_vqa --prompt short --no-image-baseline \
    --output $run/eval "${limit[@]}"

heading "5/5  Ask about three test images"
python - "$run/images" <<'END'
import pathlib, shutil, sys
import easy_vqa
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
for number, path in enumerate(list(easy_vqa.get_test_image_paths().values())[:3], 1):
    shutil.copy(path, folder / f"{number}.png")
END
for image in "$run"/images/*.png; do
    printf '%s\n' "/clear" "/image $image" \
        "what shape is in the image?" "what color is the shape?" "is there a blue shape?"
done | owl2 chat --model $run/model

heading "Results"
cat <<END
scores           $run/eval/results.json
responses        $run/eval/responses/  $run/eval/report.html  $run/eval/report.png
learning curves  $run/stage1/loss.png  $run/loss.png
model            $run/model

Ask more:  .venv/bin/owl2 chat --model $run/model --image $run/images/1.png
END
