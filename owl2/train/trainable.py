"""The trainable parameters of each training stage (Specification §2).

Every parameter belongs to one part of the model, given by its name:

    model.vision_model.…                                          vision encoder
    model.visual_abstractor.…                                     abstractor
    model.layers.N.multiway.1.…  …self_attn.multiway.1.…          the decoder's visual weights (MAM)
    model.{embed_tokens, layers, norm}.…   lm_head.…              the decoder's other weights

Stage 1 trains the first three parts, stage 2 all. The model has no dropout and no drop path (the
paper's drop path rate is 0), so the stages differ in their trainable parameters only.

LoRA matrices are named below their Linear (`…q_proj.lora_A.default.weight`, whose own weight is
then `…q_proj.base_layer.weight`), so they belong to the part of that Linear.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Column, Table
from torch import nn

from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.errors import ErrorCode, InputError


class ModelPart(StrEnum):
    """The parts of the model that training stages distinguish."""

    VISION = "vision encoder"
    ABSTRACTOR = "abstractor"
    VISUAL_WEIGHTS = "decoder: visual"
    DECODER = "decoder: text and shared"


STAGES = {
    1: (ModelPart.VISION, ModelPart.ABSTRACTOR, ModelPart.VISUAL_WEIGHTS),
    2: tuple(ModelPart),
}
# The names of the parts in recipes.
PARTS = {
    "vision": ModelPart.VISION,
    "abstractor": ModelPart.ABSTRACTOR,
    "visual": ModelPart.VISUAL_WEIGHTS,
    "decoder": ModelPart.DECODER,
}
PATTERNS = {
    ModelPart.VISION: r"model\.vision_model\.",
    ModelPart.ABSTRACTOR: r"model\.visual_abstractor\.",
    ModelPart.VISUAL_WEIGHTS: r"model\.layers\.\d+\.(self_attn\.)?multiway\.1\.",
    ModelPart.DECODER: r"model\.(embed_tokens|layers|norm)\.|lm_head\.",
}


def part_of(name: str) -> ModelPart:
    """The part of the model that a parameter belongs to.

    Raises:
        ValueError: The name is not in the released layout. Whether a new parameter is trained must
            be decided explicitly.
    """
    for part, pattern in PATTERNS.items():
        if re.match(pattern, name):
            return part
    raise ValueError(f"the parameter {name} belongs to no part of mPLUG-Owl2")


@dataclass(frozen=True)
class TrainableParams:
    """The sizes of all and of the trainable parameters by part; tied embeddings count once."""

    sizes: dict[ModelPart, int]
    trainable_sizes: dict[ModelPart, int]

    @property
    def trainable_size(self) -> int:
        """Number of trainable parameters."""
        return sum(self.trainable_sizes.values())

    @property
    def frozen_size(self) -> int:
        """Number of frozen parameters."""
        return sum(self.sizes.values()) - self.trainable_size

    def table(self, title: str) -> Table:
        """All and trainable parameters of each part, for the terminal."""
        table = numeric_table(title, "part", "all", "trainable")
        for part, size in self.sizes.items():
            table.add_row(str(part), f"{size:,}", f"{self.trainable_sizes[part]:,}")
        table.add_section()
        total = self.trainable_size + self.frozen_size
        table.add_row("all", f"{total:,}", f"{self.trainable_size:,}")
        return table


def numeric_table(title: str, first: str, *others: str) -> Table:
    """An empty table for the terminal; all columns but the first are numeric."""
    columns = (Column(name, justify="right") for name in others)
    return Table(first, *columns, title=title, title_justify="left")


def apply_stage(model: nn.Module, stage: int, freeze: Sequence[str] = ()) -> TrainableParams:
    """Make the parameters of a stage trainable and freeze all others, in place.

    Without MAM (``use_mam: false``) there are no visual weights, so stage 1 trains the vision
    encoder and the abstractor.

    Args:
        freeze: Names in `PARTS` that stay frozen although the stage trains them.

    Raises:
        ValueError: An unknown parameter, or tied weights of parts that differ.
        InputError: No parameter is trainable.
    """
    trainable = set(STAGES[stage]) - {PARTS[name] for name in freeze}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)
    named = model.named_parameters(remove_duplicate=False)
    conflicts = [n for n, p in named if p.requires_grad != (part_of(n) in trainable)]
    if conflicts:
        raise ValueError(f"tied weights in a trainable and a frozen part: {conflicts}")
    summary = summarize_trainable(model)
    if not summary.trainable_size:
        raise InputError(f"freeze: stage {stage} trains only these parts", ErrorCode.CONFLICT)
    return summary


def needs_images(model: nn.Module) -> bool:
    """Whether a sample without images trains nothing: only the image path is trainable."""
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return ModelPart.DECODER not in map(part_of, trained)


def summarize_trainable(model: nn.Module) -> TrainableParams:
    """Summarize a model's trainable parameters, given by `requires_grad`."""
    sizes: Counter[ModelPart] = Counter(dict.fromkeys(ModelPart, 0))
    trainable_sizes = sizes.copy()
    for name, parameter in model.named_parameters():
        # bitsandbytes packs two 4-bit weights into a byte and stores the original shape.
        packed = getattr(parameter, "quant_state", None)
        size = packed.shape.numel() if packed is not None else parameter.numel()
        sizes[part_of(name)] += size
        trainable_sizes[part_of(name)] += size * parameter.requires_grad
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):  # its weight is a buffer
            sizes[part_of(f"{name}.")] += module.in_features * module.out_features
    present = {part: size for part, size in sizes.items() if size}
    return TrainableParams(present, {part: trainable_sizes[part] for part in present})
