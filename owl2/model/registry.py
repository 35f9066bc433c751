"""The model types of the mPLUG-Owl2 family. Each is a combination of five parts.

A sibling of mPLUG-Owl2 adds one entry to `MODEL_TYPES` and one module for each part that is new.
Loading, training and generation look parts up here and do not branch on the model type.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from transformers import CONFIG_MAPPING

from owl2.errors import ErrorCode, InputError


@dataclass(frozen=True)
class ModelType:
    """The parts of a model type.

    Code is named by import paths (``"package.module:name"``), so that processors and checkpoints
    can be read without importing the model.

    Attributes:
        config: Configuration class, an `Owl2Config`. Its `registry_key` is the name of the entry.
        model: Model class with a language-model head.
        decoder_layer: Function of (config, layer index) that returns a decoder layer.
        vision_encoder: Module class, called with ``visual_config.visual_model``. Its `forward` maps
            pixels (N, 3, H, W) to features (N, 1+P, width).
        connector: Module class, called with ``visual_config.connector`` and the decoder's width D.
            Its `forward` maps features, and the `image_grids` of an image processor that returns
            them, to embeddings (N, num_image_tokens, D).
        tokenizer: Tokenizer class for checkpoints that contain its `vocabulary_file`.
        image_processor: Image processor class: pixels, and the texts between crops.
        image_policy: Default for images that are not square, "resize", "pad" or "crop".
        image_options: Further defaults of the image processor.
        chat_template: Default, a name in `CHAT_TEMPLATES`.
        interleave_images: Default of `Owl2Processor.interleave_images`: True for models whose
            prompts have images inside the text, such as DocOwl.
        weight_names: Pairs of prefixes: of weights in released files, and in the model.
        peft_names: A model type in PEFT's tables whose decoder has the same module names.
        title: Name for people.
    """

    config: str
    model: str = "owl2.model.modeling:Owl2ForConditionalGeneration"
    decoder_layer: str = "owl2.model.decoder:make_decoder_layer"
    vision_encoder: str = "owl2.model.vision:VisionModel"
    connector: str = "owl2.model.abstractor:VisualAbstractor"
    tokenizer: str = "owl2.processing.tokenizer:Owl2Tokenizer"
    vocabulary_file: str = "tokenizer.model"
    image_processor: str = "owl2.processing.image_processing:Owl2ImageProcessor"
    image_policy: str = "resize"
    image_options: dict[str, Any] = field(default_factory=dict)
    chat_template: str = "mplug_owl2"
    interleave_images: bool = False
    weight_names: tuple[tuple[str, str], ...] = ()
    peft_names: str = "llama"
    title: str = "mPLUG-Owl2"

    def load(self, part: str) -> Any:
        """Import the class or function of a part."""
        module, name = getattr(self, part).split(":")
        return getattr(import_module(module), name)


_DOCOWL_NAMES = (
    ("model.vision2text.", "model.visual_abstractor."),
    ("model.hr_compressor.", "model.visual_abstractor.hr_compressor."),
)
MODEL_TYPES = {
    "mplug_owl2": ModelType(config="owl2.model.configuration:Owl2Config"),
    "mplug_owl2_1": ModelType(
        title="mPLUG-Owl2.1",
        config="owl2.model.owl2_1_configuration:Owl2_1Config",
        decoder_layer="owl2.model.qwen_decoder:QwenDecoderLayer",
        vision_encoder="owl2.model.grid_vision:GridVisionModel",
        tokenizer="owl2.processing.qwen_tokenizer:QwenTokenizer",
        vocabulary_file="qwen.tiktoken",
        chat_template="mplug_owl2_1",
        weight_names=(
            ("transformer.h.", "model.layers."),
            ("transformer.wte.", "model.embed_tokens."),
            ("transformer.ln_f.", "model.norm."),
            ("transformer.vision_model.", "model.vision_model."),
            ("transformer.visual_abstractor.", "model.visual_abstractor."),
        ),
        peft_names="gpt2",
    ),
    "mplug_docowl": ModelType(
        title="DocOwl1.5",
        config="owl2.model.docowl_configuration:DocOwlConfig",
        connector="owl2.model.h_reducer:HReducer",
        image_processor="owl2.processing.anchor_crops:CropImageProcessor",
        image_options={"anchors": "grid_9"},
        interleave_images=True,
        weight_names=_DOCOWL_NAMES,
    ),
    "mplug_docowl2": ModelType(
        title="DocOwl2",
        config="owl2.model.docowl_configuration:DocOwlConfig",
        connector="owl2.model.hr_compressor:DocOwl2Connector",
        image_processor="owl2.processing.anchor_crops:CropImageProcessor",
        image_options={"anchors": "grid_12", "compress_pages": True},
        interleave_images=True,
        weight_names=_DOCOWL_NAMES,
    ),
}
DEFAULT_MODEL_TYPE = "mplug_owl2"


# Models that are not of this family, by their model types; those of transformers are named there.
OTHER_MODELS = {
    "mplug-owl": "mPLUG-Owl (1)",
    "mplug_owl": "mPLUG-Owl (1)",
    "mplugowl3": "mPLUG-Owl3",
    "llava_llama": "LLaVA",
    "llava_qwen": "LLaVA-OneVision (Q-SiT, VQA²)",
    "internvl_chat": "InternVL",
    "minicpmv": "MiniCPM-V",
    "qwen": "Qwen or Qwen-VL",
    "tinyllava": "TinyLLaVA (TinyChart)",
}
NEAREST = "MAGAer13/mplug-owl2-llama2-7b (mPLUG-Owl2)"


def get_model_type(name: str) -> ModelType:
    """The entry `name`: the ``model_type`` of a ``config.json``, or its config's `registry_key`.

    Raises:
        InputError: The model type is not registered; the message has the most similar name,
            or the nearest model.
    """
    if name not in MODEL_TYPES:
        similar = get_close_matches(name, MODEL_TYPES, n=1)
        hint = f" The most similar name is {similar[0]!r}." if similar else ""
        other = OTHER_MODELS.get(name)
        if other is None and name in CONFIG_MAPPING:
            other = CONFIG_MAPPING[name].__name__.removesuffix("Config")
        if other is not None:
            hint = f" {other} is another architecture; {NEAREST} is the nearest."
        raise InputError(
            f"model_type {name!r} is not supported; choose from {', '.join(MODEL_TYPES)}.{hint}",
            ErrorCode.UNSUPPORTED,
        )
    return MODEL_TYPES[name]


def check_visual_parts(name: str, visual_parts: Iterable[str]) -> None:
    """Check that a model type has the parts in ``visual_config`` of a ``config.json``.

    Raises:
        InputError: A part belongs to another model type. The message has the model type whose
            parts are the most similar.
    """
    own = {name: _visual_parts(name) for name in MODEL_TYPES}
    known = set().union(*own.values())
    found = known.intersection(visual_parts)
    if foreign := sorted(found - own[name]):
        nearest = max(own, key=lambda other: len(found & own[other]) - len(found - own[other]))
        config = MODEL_TYPES[nearest].config
        titles = [parts.title for parts in MODEL_TYPES.values() if parts.config == config]
        raise InputError(
            f"model_type {name!r} has no {', '.join(foreign)} in visual_config. The nearest model "
            f"type with it is {nearest!r} ({', '.join(titles)}).",
            ErrorCode.INVALID_CONFIG,
        )


def _visual_parts(name: str) -> set[str]:
    config = MODEL_TYPES[name].load("config")
    return set(config.sub_configs["visual_config"].sub_configs)
