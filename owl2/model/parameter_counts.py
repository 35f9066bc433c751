"""How large a model is, part by part, without making its weights."""

from collections import Counter

import torch
from rich.table import Table

from owl2.checkpoints.config_file import read_config
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration

PARTS = {
    "vision encoder": ("model.vision_model.",),
    "visual abstractor": ("model.visual_abstractor.",),
    "decoder": ("model.layers.", "model.norm."),
    "embeddings and head": ("model.embed_tokens.", "lm_head."),
}
VISUAL = "decoder, visual weights (MAM)"


def parameter_counts(config: Owl2Config) -> dict[str, int]:
    """The number of parameters in each part of the model; their sum is the whole model's.

    The model is made on the meta device: no memory, whatever its size. Tied weights count once.
    """
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    return dict(counts)


def describe(name_or_path: str | None = None) -> Table:
    """A table of a checkpoint's parts, from its ``config.json`` alone.

    Args:
        name_or_path: a directory or a hub id; default: the released model's configuration.

    Raises:
        InputError: if there is no configuration of an mPLUG-Owl2.
    """
    config = Owl2Config() if name_or_path is None else read_config(name_or_path)
    vision, abstractor = config.visual_config.visual_model, config.visual_config.visual_abstractor
    shapes = {
        "vision encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"{vision.image_size} px, patch {vision.patch_size}",
        "visual abstractor": f"{abstractor.num_hidden_layers} layers, width "
        f"{abstractor.hidden_size}, {config.num_image_tokens} embeddings an image",
        "decoder": f"{config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} for keys and values), "
        f"context {config.max_position_embeddings}",
        VISUAL: "norms, K and V of images",
        "embeddings and head": f"vocabulary {config.vocab_size}"
        + (", tied" if config.tie_word_embeddings else ""),
    }
    counts = parameter_counts(config)
    table = Table(title=name_or_path or "the released sizes", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("shape")
    for part, shape in shapes.items():
        if part in counts:
            table.add_row(part, f"{counts[part]:,}", shape)
    table.add_section()
    total = sum(counts.values())
    size = total * 2  # bytes
    shown = f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
    table.add_row("all", f"{total:,}", f"{shown} in 16 bits")
    return table


def _part_of(name: str) -> str:
    """The part that a parameter belongs to, by its released name (SPEC 1.4)."""
    if name.startswith("model.layers.") and ".multiway.1." in name:
        return VISUAL
    return next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
