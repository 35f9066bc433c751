"""Compiled decoding: `generate` with a static cache against the default, in float32."""

import time

import torch
from step import Step, main
from transformers import CompileConfig

from owl2.bench.presets import BenchModel

NEW_TOKENS = 32


def check(step: Step) -> None:
    """The tokens are equal."""
    model = BenchModel(size="tiny" if step.dry else "bench", device=step.device).load().float()
    ids = torch.randint(3, model.config.vocab_size, (1, 64), device=step.device)
    settings = CompileConfig(fullgraph=False, mode="default")
    settings._compile_all_devices = True  # for dry runs: by default, not on CPUs
    tokens = {}
    variants = {
        "default": {},
        "compiled": {"cache_implementation": "static", "compile_config": settings},
    }
    count = 8 if step.dry else NEW_TOKENS
    for name, options in variants.items():
        for run in ("first", "second"):
            started = time.perf_counter()
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                **options,
            )
            tokens[name] = answer[0, ids.shape[1] :].tolist()
            step.values[f"{name}_{run}_seconds"] = time.perf_counter() - started
    equal = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    step.check("equal tokens", equal, least=count)
    seconds = (step.values[f"{name}_second_seconds"] for name in variants)
    step.values["speed_ratio"] = next(seconds) / next(seconds)


if __name__ == "__main__":
    main(check)
