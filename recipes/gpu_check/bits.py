"""16, 8 and 4 bits at the released size: loading time, memory, speed, and the error of logits.

On a GPU, bitsandbytes quantizes. A dry run uses owl2's own quantization for CPUs.
"""

import gc
import time

import torch
from PIL import Image
from step import Step, main

from owl2 import Engine

NEW_TOKENS = 32
# Allowed memory relative to 16 bits, and allowed error of logits relative to their norm.
LIMITS = {"8bit": (0.65, 0.3), "4bit": (0.45, 0.8)}


def check(step: Step) -> None:
    """Memory and errors are within `LIMITS`."""
    checkpoint = step.checkpoint("tiny" if step.dry else "7b")
    content = [{"type": "image", "image": Image.new("RGB", (64, 64), "red")}]
    content.append({"type": "text", "text": "what is this?"})
    messages = [{"role": "user", "content": content}]
    ids = torch.arange(3, 67, device=step.device)[None]
    memory, logits = {}, {}
    for quantize in (None, *LIMITS):
        started = time.perf_counter()
        engine = Engine.from_pretrained(
            checkpoint, step.device, "bfloat16", quantize=quantize, enable_prefix_caching=False
        )
        values = {"load_seconds": time.perf_counter() - started}
        if not step.dry:
            values["memory_bytes"] = memory[quantize] = torch.cuda.memory_allocated()
        with torch.no_grad():
            logits[quantize] = engine.model(ids).logits.float().cpu()
        engine.chat(messages, max_new_tokens=2)  # warms up
        for name, tokens in (("first_token_seconds", 1), ("seconds", NEW_TOKENS)):
            started = time.perf_counter()
            # The length is fixed: random weights could end the answer.
            engine.chat(messages, max_new_tokens=tokens, min_new_tokens=tokens)
            values[name] = time.perf_counter() - started
        decode = values["seconds"] - values["first_token_seconds"]
        values["tokens_per_second"] = (NEW_TOKENS - 1) / decode
        step.values[quantize or "16bit"] = values
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    for quantize, (most_memory, most_error) in LIMITS.items():
        error = (logits[quantize] - logits[None]).norm() / logits[None].norm()
        step.check(f"{quantize}: error of logits", float(error), least=1e-9, most=most_error)
        if not step.dry:
            ratio = memory[quantize] / memory[None]
            step.check(f"{quantize}: memory relative to 16 bits", ratio, most=most_memory)


if __name__ == "__main__":
    main(check)
