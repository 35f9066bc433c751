"""The model types of the mPLUG-Owl2 family. Each is a combination of five parts.

A sibling of mPLUG-Owl2 adds one entry to `MODEL_TYPES` and one module for each part that is new.
Loading, training and generation look parts up here and do not branch on the model type.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from owl2.errors import ErrorCode, InputError


@dataclass(frozen=True)
class ModelType:
    """The parts of a model type.

    Code is named by import paths (``"package.module:name"``), so that the processor can read its
    two parts without importing the model.

    Attributes:
        config: Configuration class.
        decoder_layer: Function of (config, layer index) that returns a decoder layer.
        vision_encoder: Module class, called with ``visual_config.visual_model``. Its `forward` maps
            pixels (N, 3, H, W) to features (N, 1+P, width).
        connector: Module class, called with ``visual_config.visual_abstractor`` and the decoder's
            width D. Its `forward` maps features to embeddings (N, num_image_tokens, D).
        tokenizer: Tokenizer class for checkpoints with a SentencePiece ``tokenizer.model``.
        image_policy: Default for images that are not square, "resize", "pad" or "crop".
        interleave_images: Default of `Owl2Processor.interleave_images`: True for models whose
            prompts have images inside the text, such as DocOwl.
    """

    config: str
    decoder_layer: str
    vision_encoder: str
    connector: str
    tokenizer: str
    image_policy: str
    interleave_images: bool = False

    def load(self, part: str) -> Any:
        """Import the class or function of a part."""
        module, name = getattr(self, part).split(":")
        return getattr(import_module(module), name)


MODEL_TYPES = {
    "mplug_owl2": ModelType(
        config="owl2.model.configuration:Owl2Config",
        decoder_layer="owl2.model.decoder:make_decoder_layer",
        vision_encoder="owl2.model.vision:VisionModel",
        connector="owl2.model.abstractor:VisualAbstractor",
        tokenizer="owl2.processing.tokenizer:Owl2Tokenizer",
        image_policy="resize",
    )
}
DEFAULT_MODEL_TYPE = "mplug_owl2"


def get_model_type(name: str) -> ModelType:
    """The model type `name`, the ``model_type`` of a ``config.json``.

    Raises:
        InputError: The model type is not registered.
    """
    if name not in MODEL_TYPES:
        raise InputError(
            f"model_type {name!r} is not supported; choose from {', '.join(MODEL_TYPES)}.",
            ErrorCode.UNSUPPORTED,
        )
    return MODEL_TYPES[name]
