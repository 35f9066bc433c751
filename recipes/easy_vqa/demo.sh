#!/usr/bin/env bash
# The whole loop in small, on easy-VQA: build, stage 1, stage 2, evaluate, ask. Some minutes on two
# cores. `demo.sh --quick` goes through the same commands in a minute; its model learns nothing.
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

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/5  Build: a fresh language model with a tokenizer of its own, a fresh vision encoder"
owl2 init --llm fresh --vision fresh --sizes $recipes/sizes.yaml --output $run/start
owl2 info $run/start

say "2/5  Stage 1: images and captions; the language model's own weights stay as they are"
owl2 train $recipes/stage1.yaml model=$run/start output=$run/stage1 "${steps[@]}"

say "3/5  Stage 2: questions and answers; everything is trained"
owl2 train $recipes/stage2.yaml model=$run/stage1/model output=$run "${steps[@]}"

say "4/5  Evaluate: the 9,673 questions of the test split, with the image and without (blind)"
owl2 eval --model $run/model --tasks easy_vqa --prompt short --blind --output $run/eval "${limit[@]}"

say "5/5  Ask about three images of the test split"
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

say "There it is"
cat <<END
scores          $run/eval/results.json
every answer    $run/eval/answers/  $run/eval/report.html  $run/eval/report.png
learning curves $run/stage1/loss.png  $run/loss.png
the model       $run/model

Go on asking:   .venv/bin/owl2 chat --model $run/model --image $run/images/1.png
END
