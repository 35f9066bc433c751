#!/usr/bin/env bash
# Checks what only a GPU can show, in less than ten minutes, and writes FOLDER/gpu_check.json:
# golden values by attention implementation and dtype, speed and memory at the released size, 8 and
# 4 bits, compiled decoding, LoRA, FSDP2, DeepSpeed, and vLLM.
#
#   bash recipes/gpu_check.sh [--dry] [FOLDER]      default: runs/gpu_check
#
# --dry runs all steps on the CPU with tiny models. A step that fails or exceeds its time limit does
# not stop the others; the exit code is 0 if none did. Steps whose packages are not installed are
# skipped. VLLM_PYTHON is the Python command of an environment with vLLM and owl2. The checkpoint of
# the released size needs 17 GB in FOLDER.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=() factor=1
if [ "${1:-}" = --dry ]; then
    dry=(--dry) factor=5 # CPUs are slower, and shared
    shift
fi
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    echo "usage: bash recipes/gpu_check.sh [--dry] [FOLDER]" >&2
    exit 2
fi
folder=${1:-runs/gpu_check}
if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -e "$folder/steps.tsv" ]; then
    echo "error: $folder contains files of others, which would be deleted; give a new folder" >&2
    exit 2
fi
python=${PYTHON:-python}
limit=${GPU_CHECK_SECONDS:-$((590 * factor))} # of all steps
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

mkdir -p "$folder"
# Checkpoints and data are kept; results of an earlier run are not.
rm -rf "$folder"/*.json "$folder"/run-* "$folder"/{bench,lora,vllm}
: >"$folder/steps.tsv"
start=$SECONDS

# step NAME SECONDS: run a step, for at most SECONDS and the rest of the time limit.
step() {
    local name=$1 seconds=$(($2 * factor)) began=$SECONDS code=0 reason=
    local left=$((limit - (SECONDS - start)))
    printf '\n\033[1m%s\033[0m\n' "$name"
    if [ "$left" -lt 10 ]; then
        code=124 reason="no time left"
    else
        timeout --kill-after 5 "$((seconds < left ? seconds : left))" \
            "$python" "recipes/gpu_check/$name.py" "$folder" --output "$folder/$name.json" "${dry[@]}" || code=$?
        if [ "$code" = 124 ] || [ "$code" = 137 ]; then reason="time limit"; fi
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" "$reason" >>"$folder/steps.tsv"
}

step environment 30
step golden 90
step full_size 150
step bits 150
step compiled 90
step fsdp2 90
step deepspeed_zero3 60
step lora_memory 120
step vllm_cuda 120

"$python" recipes/gpu_check/summary.py "$folder" "${dry[@]}"
