"""The golden values of the authors, by attention implementation and dtype.

float32 has the tolerance of tests/golden/README.md. The error of bfloat16 is relative to the
largest logit.
"""

import sys
from itertools import product
from typing import Any

import torch
from step import ROOT, Step, main
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(ROOT))

from tests.model.golden import MODELS, inputs_of, load_cases, load_model

CASES = ("text", "image", "two_images")
ATTENTION = ("eager", "sdpa", "flash_attention_2")
FLOAT32_ERROR = 1e-4
BFLOAT16_ERROR = 0.08  # 0.04 on CPUs


def check(step: Step) -> None:
    """Logits of all cases, greedy tokens in float32."""
    has_flash = not step.dry and is_flash_attn_2_available()
    step.values["flash_attention_2"] = has_flash
    for name, attention, dtype in product(MODELS, ATTENTION, ("float32", "bfloat16")):
        if attention == "flash_attention_2" and (dtype == "float32" or not has_flash):
            continue
        options = {"attn_implementation": attention, "dtype": getattr(torch, dtype)}
        model = load_model(name, **options).to(step.device)
        cases = load_cases(name)
        for case in CASES:
            expected = cases[f"{case}.logits"]
            with torch.no_grad():
                logits = model(**_inputs(model, cases, case)).logits.float().cpu()
            error = float((logits - expected).abs().max())
            title = f"{name} {attention} {dtype} {case}"
            if dtype == "float32":
                step.check(title, error, most=FLOAT32_ERROR)
            else:
                step.check(title, error / float(expected.abs().max()), most=BFLOAT16_ERROR)
        if dtype == "float32":
            for case in ("generate_text", "generate_image"):
                inputs = _inputs(model, cases, case)
                answer = model.generate(**inputs, max_new_tokens=24, do_sample=False).cpu()
                expected = cases[f"{case}.new_tokens"].flatten()
                equal = int((answer[0, -len(expected) :] == expected).sum())
                step.check(f"{name} {attention} {case} tokens", equal, least=len(expected))


def _inputs(model: Any, cases: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """The inputs of a case on the device and in the dtype of the model."""
    inputs = {
        key: value.to(model.device) for key, value in inputs_of(cases, case, model.config).items()
    }
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


if __name__ == "__main__":
    main(check)
