"""Speed and memory at the released size, as fractions of the limits of the GPU.

`owl2 bench` measures the speed. The memory is that of an answer to a question about an image.
"""

import json

import torch
from step import Step, main

from owl2.bench.presets import BenchModel

CASES = ("encode_8", "prefill_1", "prefill_8", "decode_1", "decode_16")
TEXT_TOKENS, NEW_TOKENS = 64, 32
MEMORY_OVER_WEIGHTS = 1.2


def check(step: Step) -> None:
    """The peak memory is at most 1.2 times that of the weights."""
    size = "tiny" if step.dry else "7b"
    model = BenchModel(size=size, device=step.device, dtype="bfloat16").load()
    weights = sum(weight.nbytes for weight in model.parameters())
    config = model.config
    text = torch.randint(3, config.vocab_size, (1, TEXT_TOKENS), device=step.device)
    image = torch.full((1, config.num_image_tokens), config.image_token_id, device=step.device)
    edge = config.image_size
    pixels = torch.randn(1, 3, edge, edge, device=step.device, dtype=model.dtype)
    ids = torch.cat([image, text], 1)
    answer = model.generate(
        ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    step.check("generated tokens", answer.shape[1] - ids.shape[1], least=NEW_TOKENS)
    step.values["weight_bytes"] = weights
    if not step.dry:
        peak = torch.cuda.max_memory_allocated()
        step.values["peak_bytes"] = peak
        step.check("peak memory over weights", peak / weights, most=MEMORY_OVER_WEIGHTS)
    del model
    torch.cuda.empty_cache()
    output = step.folder / "bench"
    step.owl2(
        *("bench", "--size", size, "--device", step.device, "--dtype", "bfloat16"),
        *("--cases", ",".join(CASES), "--repeats", "1" if step.dry else "3", "--output", output),
    )
    results = json.loads((output / "bench.json").read_text())
    step.values["machine"] = results["machine"]
    step.values["skipped"] = results["skipped"]
    step.values["cases"] = {
        name: {key: case[key] for key in ("owl2", "unit", "roofline_fraction", "ratio", "llama")}
        for name, case in results["cases"].items()
    }
    step.check("measured cases", len(results["cases"]), least=len(CASES))


if __name__ == "__main__":
    main(check)
