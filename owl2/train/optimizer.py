"""AdamW over parameter groups (Specification §2).

Each group has its own learning rate and weight decay.

The learning rate of the ViT decays from top to bottom by a factor d (0.9) per level, as in BEiT.
With L blocks there are L + 2 levels, and level l of 0 … L+1 has d^(L+1-l) of the peak rate:

    level 0       embeddings (class token, positions, patches, pre_layernorm)     d^(L+1)
    level i + 1   block i of 0 … L-1                                              d^(L-i)
    level L + 1   post_layernorm                                                  1

The last block has d, not 1: the full rate applies above the blocks. Decoder, abstractor and the top
of the ViT have the same peak rate unless a recipe sets the latter two. The schedule multiplies the
rates of all groups by the same factor. Weight decay applies to matrices, not to norms, biases and
embeddings.
"""

import re
from typing import Any

import torch
from rich.table import Table
from torch import nn

from owl2.train.recipe import Recipe
from owl2.train.trainable import ModelPart, numeric_table, part_of

# Learned vectors of tokens or positions. A tied lm_head has the name of `embed_tokens`.
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.vision_model.embeddings.position_embedding",
    "model.vision_model.embeddings.cls_token",
    "model.visual_abstractor.query_embeds",
    "model.visual_abstractor.vit_eos",
    "model.visual_abstractor.hr_compressor.compressor_eos",
)
VISION_LEVEL = re.compile(
    r"model\.vision_model\.((?P<bottom>embeddings)|encoder\.layers\.(?P<block>\d+)|post_layernorm)\."
)


def recipe_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The `parameter_groups` of a recipe."""
    return parameter_groups(
        model,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        vision_lr_layer_decay=recipe.vision_lr_layer_decay,
        vision_learning_rate=recipe.vision_learning_rate,
        abstractor_learning_rate=recipe.abstractor_learning_rate,
    )


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    vision_lr_layer_decay: float,
    vision_learning_rate: float | None = None,
    abstractor_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups that contain every trainable parameter exactly once.

    Args:
        vision_learning_rate: Peak rate at the top of the ViT; None: `learning_rate`.
        abstractor_learning_rate: Peak rate of the abstractor; None: `learning_rate`.

    Returns:
        Dicts with ``params``, ``lr`` (the peak of the group) and ``weight_decay``; for reports,
        ``name`` and ``lr_scale``, relative to `learning_rate`. The decoder comes first, so if it is
        trained the first group has `learning_rate`, which the Trainer reports.
    """
    matches = (VISION_LEVEL.match(name) for name, _ in model.named_parameters())
    blocks = 1 + max((int(m["block"]) for m in matches if m and m["block"]), default=-1)
    peaks = {ModelPart.VISION: vision_learning_rate, ModelPart.ABSTRACTOR: abstractor_learning_rate}
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        level, title, scale = 0, str(part), (peaks.get(part) or learning_rate) / learning_rate
        if part is ModelPart.VISION:
            level, title = _vision_level(name, blocks)
            scale *= vision_lr_layer_decay ** (blocks + 1 - level)
        decays = parameter.ndim >= 2 and name not in EMBEDDINGS
        new_group = {
            "name": title,
            "params": [],
            "lr": learning_rate * scale,
            "lr_scale": scale,
            "weight_decay": weight_decay if decays else 0.0,
        }
        group = groups.setdefault((list(ModelPart).index(part), level, decays), new_group)
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def _vision_level(name: str, blocks: int) -> tuple[int, str]:
    """The level of a parameter of the ViT, and its name."""
    match = VISION_LEVEL.match(name)
    if match is None:
        raise ValueError(f"the parameter {name} has no level in the vision encoder")
    if match["bottom"]:
        return 0, "vision embeddings"
    if match["block"]:
        return int(match["block"]) + 1, f"vision block {match['block']}"
    return blocks + 1, "vision post_layernorm"


def make_adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over the groups, fused where the device supports it."""
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=fused)


def groups_table(groups: list[dict[str, Any]]) -> Table:
    """The groups for the terminal: name, learning rate, weight decay, number of parameters."""
    columns = ("part", "x lr", "peak lr", "decay", "tensors", "parameters")
    table = numeric_table("Parameter groups", *columns)
    for group in groups:
        table.add_row(
            group["name"],
            f"{group['lr_scale']:.4f}",
            f"{group['lr']:.3g}",
            f"{group['weight_decay']:g}",
            str(len(group["params"])),
            f"{sum(p.numel() for p in group['params']):,}",
        )
    return table
