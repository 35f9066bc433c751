"""LoRA adapters with random weights, and the models with the merged adapters."""

from functools import partial

import torch

from owl2.checkpoints.adapters import find_adapter, merge_adapter
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.adapters import apply_lora
from owl2.train.recipe import LoraSettings

load = partial(Owl2ForConditionalGeneration.from_pretrained, dtype=torch.float32)


def make_adapter(base, folder, seed, **settings):
    model = load(base)
    apply_lora(model, LoraSettings(**settings), seed=seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=source)
    model.save_pretrained(folder)
    return folder


def merged_model(base, folder):
    model = load(folder, base=base)
    merge_adapter(model, find_adapter(folder, {}))
    return model.eval()
