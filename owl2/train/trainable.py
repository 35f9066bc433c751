"""What each stage of training trains (SPEC §2).

Every parameter belongs to one part of the model, told by its registered name, step by step:

    model.vision_model.…                                          vision encoder
    model.visual_abstractor.…                                     abstractor
    model.layers.N.{two norms, k_proj, v_proj}.multiway.1.…       the decoder's visual weights (MAM)
    model.{embed_tokens, layers, norm}.…   lm_head.…              the decoder's other weights

Stage 1 trains the first three, stage 2 all. The model has no dropout and no drop path of its own
(the paper's drop path is 0), so a stage is nothing but the set of trained parameters.

LoRA's matrices stand below the Linear that they belong to (`…q_proj.lora_A.default.weight`, whose
own weight is then `…q_proj.base_layer.weight`), so they are of that Linear's part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from owl2.errors import InputError


class Part(StrEnum):
    """The parts of the model that stages tell apart."""

    VISION = "vision encoder"
    ABSTRACTOR = "abstractor"
    VISUAL_WEIGHTS = "decoder: visual"
    DECODER = "decoder: text and shared"


TRAINED = {
    1: (Part.VISION, Part.ABSTRACTOR, Part.VISUAL_WEIGHTS),
    2: tuple(Part),
}

# What recipes call the parts.
PARTS = {
    "vision": Part.VISION,
    "abstractor": Part.ABSTRACTOR,
    "visual": Part.VISUAL_WEIGHTS,
    "decoder": Part.DECODER,
}


def part_of(name: str) -> Part:
    """The part that a parameter of this registered name belongs to.

    Raises:
        ValueError: for a name outside the released layout: whether it is trained must be decided
            by whoever adds it, not guessed here.
    """
    match name.split("."):
        case ["model", "vision_model", *_]:
            return Part.VISION
        case ["model", "visual_abstractor", *_]:
            return Part.ABSTRACTOR
        case [
            "model",
            "layers",
            _,
            "input_layernorm" | "post_attention_layernorm",
            "multiway",
            "1",
            *_,
        ]:
            return Part.VISUAL_WEIGHTS
        case ["model", "layers", _, "self_attn", "k_proj" | "v_proj", "multiway", "1", *_]:
            return Part.VISUAL_WEIGHTS
        case ["model", "embed_tokens" | "layers" | "norm", *_] | ["lm_head", *_]:
            return Part.DECODER
    raise ValueError(f"the parameter {name} belongs to no part of mPLUG-Owl2 known to the stages")


@dataclass(frozen=True)
class Trained:
    """Which parameters are trained and which are frozen, by name; their sizes by part.

    A parameter with two names (tied embeddings) stands here with both and is counted once.
    """

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    sizes: dict[Part, int]
    trained_sizes: dict[Part, int]

    @property
    def trainable_size(self) -> int:
        """Trained numbers."""
        return sum(self.trained_sizes.values())

    @property
    def frozen_size(self) -> int:
        """Numbers that stay as they are."""
        return sum(self.sizes.values()) - self.trainable_size

    def lines(self) -> Iterable[str]:
        """For people: a line a part that the model has."""
        for part, size in self.sizes.items():
            trained = self.trained_sizes[part]
            verb = (
                "trained"
                if trained == size
                else "frozen"
                if not trained
                else f"{trained:,} trained"
            )
            yield f"{part:<26} {size:>13,} parameters  {verb}"


def apply_stage(model: nn.Module, stage: int, frozen: Sequence[str] = ()) -> Trained:
    """Let exactly the parameters of a stage be trained, in place; say which.

    Without MAM (``use_mam: false``) there are no visual weights, so stage 1 trains the vision
    encoder and the abstractor.

    Args:
        frozen: parts (names of `PARTS`) that stay as they are although the stage trains them.

    Raises:
        ValueError: for a stage other than 1 or 2, or a parameter that no part claims.
        InputError: nothing is left to train.
    """
    if stage not in TRAINED:
        raise ValueError(f"there are stages 1 and 2, not {stage}")
    wanted = set(TRAINED[stage]) - {PARTS[name] for name in frozen}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in wanted)
    named = model.named_parameters(remove_duplicate=False)
    at_odds = [n for n, p in named if p.requires_grad != (part_of(n) in wanted)]
    if at_odds:
        raise ValueError(f"tied weights of parts that a stage tells apart: {at_odds}")
    trained = what_is_trained(model)
    if not trained.trainable:
        raise InputError(f"frozen: of what stage {stage} trains, nothing is left")
    return trained


def what_is_trained(model: nn.Module) -> Trained:
    """What of a model is to be trained, told by its parameters' `requires_grad`."""
    sizes, trained_sizes = dict.fromkeys(Part, 0), dict.fromkeys(Part, 0)
    for name, parameter in model.named_parameters():
        # bitsandbytes packs two 4-bit numbers into a byte and keeps the shape beside them.
        packed = getattr(parameter, "quant_state", None)
        size = packed.shape.numel() if packed is not None else parameter.numel()
        sizes[part_of(name)] += size
        trained_sizes[part_of(name)] += size * parameter.requires_grad
    # All names, those of tied weights too: what one name trains, another must not call frozen.
    named = list(model.named_parameters(remove_duplicate=False))
    trainable = tuple(name for name, parameter in named if parameter.requires_grad)
    frozen = tuple(name for name, parameter in named if not parameter.requires_grad)
    there = {part: size for part, size in sizes.items() if size}
    return Trained(trainable, frozen, there, {part: trained_sizes[part] for part in there})
