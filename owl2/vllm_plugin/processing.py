"""Images and placeholders for vLLM, with the processor of the checkpoint.

ids with one image_token_id for each image ──► K + 1 positions each, recorded by vLLM
images ──Owl2ImageProcessor──► pixel_values (3, H, W) each, cached by content
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.processing.image_io import load_image
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.processor import Owl2Processor

# The id at the positions of an image. Any valid id works: the image's embedding replaces it.
PLACEHOLDER_ID = 0
OPTIONS = ("image_policy",)


@lru_cache(maxsize=8)
def _processor(name: str, revision: str | None, image_policy: Any) -> Owl2Processor:
    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    return Owl2Processor.from_pretrained(name, image_policy=image_policy, **hub)


class ImageParser(MultiModalDataParser):
    """Converts images to RGB as owl2 does; vLLM would put transparent images on white."""

    def _parse_image_data(self, data: Any) -> Any:
        items = [data] if isinstance(data, Image.Image) else data
        if isinstance(items, list):
            items = [load_image(item) if isinstance(item, Image.Image) else item for item in items]
        return super()._parse_image_data(items)


class Owl2ProcessingInfo(BaseProcessingInfo):
    """The properties of a checkpoint that vLLM needs to plan the input."""

    def get_hf_config(self) -> Owl2Config:
        return self.ctx.get_hf_config(Owl2Config)

    def get_hf_processor(self, **kwargs: Any) -> Owl2Processor:
        """The processor of the checkpoint.

        Args:
            kwargs: The `mm_processor_kwargs` of a request or of the server.

        Raises:
            InputError: An option that is not in `OPTIONS`, or an unknown image policy.
        """
        options = self.ctx.get_merged_mm_kwargs(kwargs)
        if unknown := sorted(options.keys() - set(OPTIONS)):
            raise InputError(
                f"mm_processor_kwargs: unknown option {', '.join(unknown)}; supported: "
                f"{', '.join(OPTIONS)}.",
                ErrorCode.UNKNOWN_NAME,
            )
        model = self.ctx.model_config
        return _processor(model.model, model.revision, options.get("image_policy"))

    def get_data_parser(self) -> ImageParser:
        return ImageParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.get_hf_config().num_image_tokens}


class Owl2DummyInputs(BaseDummyInputsBuilder[Owl2ProcessingInfo]):
    """The largest input, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        size = self.info.get_hf_config().image_size
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=size, height=size, num_images=count)}


class Owl2MultiModalProcessor(BaseMultiModalProcessor[Owl2ProcessingInfo]):
    """Converts the ids and images of a prompt to the inputs of the model."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        images = list(hf_data["images"])
        if isinstance(images[0], torch.Tensor) and images[0].is_floating_point():
            # Pixel values from `offline`.
            pixels = torch.stack(images)
        else:
            image_processor = self.info.get_hf_processor(**hf_kwargs).image_processor
            pixels = image_processor(images)["pixel_values"]
        return BatchFeature({"pixel_values": pixels.to(self.info.ctx.model_config.dtype)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor()
        positions = [PLACEHOLDER_ID] * processor.num_image_tokens
        return [
            PromptReplacement(
                modality="image", target=[processor.image_token_id], replacement=positions
            )
        ]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        placeholders = token_ids.count(self.info.get_hf_processor().image_token_id)
        images = len(mm_prompt_updates.get("image", ()))
        if placeholders != images:
            raise VLLMValidationError(
                f"The prompt has {placeholders} {IMAGE_TOKEN} placeholder(s), but {images} "
                "image(s) were given; each image needs one placeholder.",
                parameter="image",
            )
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)
