"""The golden values of the authors: checkpoints in the released layout, inputs and outputs."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from owl2.model.modeling import Owl2ForConditionalGeneration

MODELS = ("model_mha", "model_wide")
FOLDER = Path(__file__).parent.parent / "golden"
IMAGE = -200  # marks an image in the cases' ids


def load_model(name, **options):
    return Owl2ForConditionalGeneration.from_pretrained(FOLDER / name, **options).eval()


def load_cases(name):
    return load_file(FOLDER / name / "cases.safetensors")


def expand(values, ids, config, fill=None):
    """Rows of T values to rows in which an image has K + 1 positions.

    Their value is `fill`, or the value at the position of the image if `fill` is None.
    """
    rows = []
    for row, marks in zip(values.tolist(), ids.tolist(), strict=True):
        expanded = []
        for value, mark in zip(row, marks, strict=True):
            if mark != IMAGE:
                expanded.append(value)
            else:
                kept = value if fill is None else fill
                expanded += [kept] * config.num_image_tokens
        rows.append(expanded)
    return torch.tensor(rows)


def inputs_of(cases, case, config):
    """The model inputs of a case."""
    ids = cases[f"{case}.input_ids"]
    inputs = {"input_ids": expand(ids, ids, config, fill=config.image_token_id)}
    for name in ("pixel_values", "attention_mask", "labels"):
        if f"{case}.{name}" in cases:
            inputs[name] = cases[f"{case}.{name}"]
    if "labels" in inputs:
        inputs["labels"] = expand(inputs["labels"], ids, config, fill=-100)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = expand(inputs["attention_mask"], ids, config).long()
    return inputs
