"""Groups of parameters with their own rate and weight decay, and the optimizer over them (SPEC §2).

The ViT's rates fall from top to bottom by a factor d (0.9) a level, as in BEiT. With L blocks there
are L + 2 levels, and level l of 0 … L+1 is trained at d^(L+1-l) of the peak rate:

    level 0       embeddings (class token, positions, patches, pre_layernorm)     d^(L+1)
    level i + 1   block i of 0 … L-1                                              d^(L-i)
    level L + 1   post_layernorm                                                  1

so the last block has d, not 1: the full rate is for what stands above the ViT's blocks. Decoder,
abstractor and the ViT's top have the same peak rate unless a recipe gives the latter two others.
Each group falls to its own share of its own peak: minima keep the peaks' proportions. Weight decay
is for matrices: not for norms and biases (vectors), not for embeddings.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from owl2.train.recipe import Recipe
from owl2.train.trainable import Part, part_of

# Learned vectors that stand for tokens or positions; a tied lm_head is `embed_tokens`, too.
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.vision_model.embeddings.position_embedding",
    "model.vision_model.embeddings.cls_token",
    "model.visual_abstractor.query_embeds",
    "model.visual_abstractor.vit_eos",
)


class _Kind(NamedTuple):
    """What parameters of one group have in common; sorts from the image up to the words."""

    part: int
    level: int
    name: str
    scale: float
    decays: bool


def recipe_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The `parameter_groups` that a recipe asks for."""
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
    """Groups for a torch optimizer that hold every trainable parameter exactly once.

    Args:
        vision_learning_rate: the ViT's at its top, falling from there; None: as all.
        abstractor_learning_rate: the abstractor's; None: as all.

    Returns:
        Dicts with ``params``, ``lr`` (the group's peak), ``weight_decay``; for people, ``name``
        and ``lr_scale``, relative to `learning_rate`. From the words down to the image, so if any
        of the decoder is trained the first has `learning_rate`: it is the one that the Trainer
        reports.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = 1 + max(
        (_vision_block(name) for name, _ in model.named_parameters()),
        default=-1,
    )
    peaks = {Part.VISION: vision_learning_rate, Part.ABSTRACTOR: abstractor_learning_rate}
    members: dict[_Kind, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        kind = _kind(name, parameter, blocks, vision_lr_layer_decay)
        peak = peaks.get(part_of(name)) or learning_rate
        members[kind._replace(scale=kind.scale * peak / learning_rate)].append(parameter)
    groups = [
        {
            "name": kind.name,
            "params": parameters,
            "lr": learning_rate * kind.scale,
            "lr_scale": kind.scale,
            "weight_decay": weight_decay if kind.decays else 0.0,
        }
        for kind, parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
    _assert_once(groups, [parameter for _, parameter in named])
    return groups


def _kind(name: str, parameter: nn.Parameter, blocks: int, decay: float) -> _Kind:
    part = part_of(name)
    decays = parameter.ndim >= 2 and name not in EMBEDDINGS
    if part is not Part.VISION:
        return _Kind(list(Part).index(part), 0, str(part), 1.0, decays)
    level = _vision_level(name, blocks)
    titles = {0: "vision embeddings", blocks + 1: "vision post_layernorm"}
    title = titles.get(level, f"vision block {level - 1}")
    return _Kind(0, level, title, decay ** (blocks + 1 - level), decays)


def _vision_block(name: str) -> int:
    """The number of the ViT block that a parameter is in; -1 outside the blocks."""
    match name.split("."):
        case ["model", "vision_model", "encoder", "layers", block, *_]:
            return int(block)
    return -1


def _vision_level(name: str, blocks: int) -> int:
    """0 for the ViT's embeddings, i + 1 for block i, `blocks` + 1 for post_layernorm."""
    match name.split("."):
        case ["model", "vision_model", "embeddings", *_]:
            return 0
        case ["model", "vision_model", "encoder", "layers", block, *_]:
            return int(block) + 1
        case ["model", "vision_model", "post_layernorm", *_]:
            return blocks + 1
    raise ValueError(f"the parameter {name} stands at no level of the vision encoder")


def _assert_once(groups: list[dict[str, Any]], trainable: list[nn.Parameter]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter stands in two groups"
    assert set(grouped) == {id(parameter) for parameter in trainable}, "a parameter has no group"


def make_adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over the groups, in one fused kernel a group where the device has one."""
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=fused)


def groups_table(groups: list[dict[str, Any]]) -> Table:
    """The groups for the terminal: which, at what rate and decay, how many numbers."""
    table = Table(title="What is trained", title_justify="left")
    table.add_column("part")
    for column in ("× rate", "rate", "decay", "tensors", "parameters"):
        table.add_column(column, justify="right")
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
