"""Parameter counts of each part of a model, computed without its weights."""

from collections import Counter

import torch

from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration

PART_PREFIXES = {
    "vision encoder": ("model.vision_model.",),
    "visual abstractor": ("model.visual_abstractor.",),
    "decoder": ("model.layers.", "model.norm."),
    "embeddings and head": ("model.embed_tokens.", "lm_head."),
}
VISUAL_WEIGHTS = "decoder, visual weights (MAM)"


def parameter_counts(config: Owl2Config) -> dict[str, int]:
    """The number of parameters in each part; their sum is the total of the model.

    The model is created on the meta device and uses no memory. Tied weights count once.
    """
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(part for part, start in PART_PREFIXES.items() if name.startswith(start))
        if part == "decoder" and ".multiway.1." in name:
            part = VISUAL_WEIGHTS
        counts[part] += parameter.numel()
    return dict(counts)
