"""Images to pixels.

::

    path, URL, PIL, bytes, data URI, array ──load_image──► RGB image
    RGB image ──to_square──► (edge, edge) ──CLIP mean and std──► (3, edge, edge)
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_channel_dimension_format, to_pil_image
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.processing.image_io import (
    DEFAULT_MAX_PIXELS,
    POLICIES,
    Alpha,
    ImagePolicy,
    check_max_pixels,
    load_image,
)
from owl2.processing.image_square import to_square
from owl2.processing.message_parts import IMAGE_TOKEN

_SAVED: tuple[str, ...] = (
    *("image_processor_type", "do_convert_rgb", "do_resize", "size", "resample"),
    *("do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "image_policy", "max_pixels"),
)


class Owl2ImageProcessorKwargs(ImagesKwargs, total=False):
    """The options of transformers' image processors and two of owl2."""

    image_policy: ImagePolicy | None
    max_pixels: int | None


class Owl2ImageProcessor(PilBackend):
    """Images to normalized pixels, as in a checkpoint's ``preprocessor_config.json``.

    Specification §1.5. Options are arguments of the class and of a call. `size` and `crop_size` are
    an edge in pixels in any form of transformers. Arrays of floats have values between 0 and 1,
    with `do_rescale` or without.

    Args:
        image_policy: For images that are not square. "resize" stretches them to a square of the
            longer edge; "pad" centers them in a square filled with the mean color; "crop" keeps the
            central square, as CLIP's processor.
        max_pixels: Limit of `load_image`.

    Attributes:
        alpha: For transparent images, see `load_image`; evaluation sets it to "drop".

    Raises:
        InputError: An option is invalid.
    """

    alpha: Alpha = "white"
    saved_options = _SAVED  # keys of `to_dict`
    makes_crops = False  # of complete images, without an image policy

    valid_kwargs = Owl2ImageProcessorKwargs
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True
    size = {"shortest_edge": 448}
    crop_size = {"height": 448, "width": 448}
    default_to_square = False
    resample = Image.Resampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    image_policy: ImagePolicy = "resize"
    max_pixels = DEFAULT_MAX_PIXELS

    def __init__(self, size: Any = None, image_policy: str | None = None, **kwargs: Any) -> None:
        if "crop_size" not in kwargs or size is None:
            size = size or kwargs.get("crop_size", self.size)
            kwargs["crop_size"] = size
        kwargs["image_policy"] = self.image_policy if image_policy is None else image_policy
        super().__init__(size=size, **kwargs)

    @property
    def edge(self) -> int:
        """Edge of the square input of the model in pixels."""
        return int(self.size["shortest_edge"])

    def _standardize_kwargs(  # type: ignore[override]  # the same options by name
        self, size: Any = None, crop_size: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        edge = _edge(size, crop_size if kwargs["do_center_crop"] else None)
        if (policy := kwargs["image_policy"]) not in POLICIES:
            raise _invalid(f"image_policy is {policy!r}; choose from {', '.join(POLICIES)}")
        check_max_pixels(kwargs["max_pixels"])
        mean, std = (_floats(kwargs[key]) for key in ("image_mean", "image_std"))
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise _invalid(
                f"image_mean {kwargs['image_mean']} and image_std {kwargs['image_std']} must have "
                "a value per channel, those of image_std above 0"
            )
        if not _floats(kwargs["rescale_factor"]):
            raise _invalid(f"rescale_factor is {kwargs['rescale_factor']!r}, not a number")
        if kwargs["do_resize"] is False or not isinstance(kwargs["resample"], int):
            raise _invalid("do_resize must be true and resample a filter of Pillow")
        kwargs |= {"image_mean": mean, "image_std": std, "size": {"shortest_edge": edge}}
        standard: dict[str, Any] = super()._standardize_kwargs(crop_size=edge, **kwargs)
        return standard

    def _preprocess_image_like_inputs(  # type: ignore[override]  # the same options by name
        self,
        images: Any,
        *args: Any,
        return_tensors: str | None = None,
        device: Any = None,
        **options: Any,
    ) -> BatchFeature:
        """One image or a list of images to `pixel_values` (N, C, edge, edge) in float32.

        Args:
            return_tensors: "pt" (torch, the default) or "np".

        Raises:
            InputError: See `load_image`. The message has the position of the image in the list.
        """
        batch = _flatten(images)
        edge = options["size"]["shortest_edge"]
        mean, std = options["image_mean"], options["image_std"]
        if not options["do_normalize"]:
            mean, std = (0.0,), (1.0,)
        found, sizes = [], []
        for index, source in enumerate(batch):
            image = self.load(source, index, batch, **options)
            sizes.append(image.size)
            scale = float(options["rescale_factor"])
            if not options["do_rescale"]:
                scale = 1 / 255 if "float" in str(getattr(source, "dtype", "")) else 1.0
            for square in self.make_squares(image, edge, options):
                colors = np.atleast_3d(np.asarray(square))
                channels = colors.shape[2]
                pixels = np.empty((channels, edge, edge), dtype=np.float32)
                for channel, levels in enumerate(_levels(scale, mean, std, channels)):
                    np.take(levels, colors[..., channel], out=pixels[channel], mode="clip")
                found.append(pixels)
        # One image is not copied.
        values = found[0][None] if len(found) == 1 else np.empty((0, 3, edge, edge), np.float32)
        if len(found) > 1:
            values = np.stack(found)
        grids = self.describe_squares(sizes, edge, options)
        if return_tensors == "np":
            own = {name: grid.numpy() for name, grid in grids.items()}
            return BatchFeature({"pixel_values": values, **own})
        tensors = {"pixel_values": torch.from_numpy(values), **grids}
        return BatchFeature({name: tensor.to(device) for name, tensor in tensors.items()})

    def load(self, source: Any, index: int, batch: list[Any], **options: Any) -> Image.Image:
        """`process_image` of one of several images, whose number is in the message of an error."""
        with error_prefix(f"Image {index + 1} of {len(batch)}: " if len(batch) > 1 else ""):
            return self.process_image(source, **({"max_pixels": self.max_pixels} | options))

    # ------------------------------------------------------------------ one square per image

    def make_squares(self, image: Image.Image, edge: int, options: Any) -> list[Image.Image]:
        """The squares of an image, in the order of their pixels.

        Args:
            edge: Of a square, in pixels.
            options: Of the class and the call.
        """
        policy, mean = options["image_policy"], options["image_mean"]
        return [to_square(image, edge, policy, mean, options["resample"])]

    def expand_images(self, images: list[Any]) -> tuple[list[str], list[Any]]:
        """The text that replaces `<|image|>` for each image of a prompt, and the images.

        Images that had to be opened are returned decoded.
        """
        return [IMAGE_TOKEN] * len(images), images

    def count_squares(self, width: int, height: int) -> tuple[int, int]:
        """The numbers of `<|image|>` and of squares for an image of this size in pixels."""
        return 1, 1

    def describe_squares(
        self, sizes: list[tuple[int, int]], edge: int, options: Any
    ) -> dict[str, torch.Tensor]:
        """Further inputs of the model, from the sizes of the images in pixels."""
        return {}

    def process_image(  # type: ignore[override]  # to an image, not to an array
        self,
        image: Any,
        do_convert_rgb: bool | None = True,
        input_data_format: Any = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        **options: Any,
    ) -> Image.Image:
        """The image in RGB; its channels are kept with `do_convert_rgb=False`."""
        if do_convert_rgb is False:
            return to_pil_image(image, input_data_format=input_data_format)
        if input_data_format is not None and hasattr(image, "shape"):
            image = to_channel_dimension_format(
                np.asarray(image), "channels_last", input_data_format
            )
        return load_image(image, max_pixels, self.alpha)

    # ------------------------------------------------------------------ preprocessor_config.json

    def to_dict(self) -> dict[str, Any]:
        """The keys of a CLIPImageProcessor, and two of owl2."""
        values = super().to_dict()
        return {key: values[key] for key in self.saved_options if key in values}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a ``preprocessor_config.json``.

        Raises:
            InputError: A value is invalid.
        """
        if "size" in kwargs:
            kwargs.setdefault("crop_size", kwargs["size"])
        try:
            return super().from_dict(image_processor_dict, **kwargs)
        except InputError as error:
            raise InputError(
                f"preprocessor_config.json: {error}", ErrorCode.INVALID_CONFIG
            ) from error

    def replace(self, **options: Any) -> "Owl2ImageProcessor":
        """A copy with other options."""
        if "size" in options:
            options["crop_size"] = options["size"]
        return type(self)(**self.to_dict() | options)


@lru_cache(maxsize=16)
def _levels(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> list[np.ndarray]:
    """The normalized value of each of 256 levels, for every channel.

    It is computed in the order of CLIP's processor (scale, shift, divide, in float32). A lookup
    replaces three passes over the image.
    """
    levels = np.arange(256, dtype=np.float32) * np.float32(scale)
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    return [
        ((levels - np.float32(shift)) / np.float32(divisor)).astype(np.float32)
        for shift, divisor in zip(mean, std, strict=True)
    ]


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in _flatten(nested)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _floats(values: Any) -> tuple[float, ...]:
    """One or several finite numbers; () for anything else."""
    numbers = tuple(values) if isinstance(values, (list, tuple)) else (values,)
    is_valid = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    return tuple(map(float, numbers)) if is_valid else ()


def _edge(*sizes: Any) -> int:
    """The one edge in sizes, which are integers, dicts or None."""
    edges: list[Any] = []
    for size in sizes:
        if size is not None:
            values = dict(size).values() if isinstance(size, (Mapping, SizeDict)) else [size]
            edges += [edge for edge in values if edge is not None]
    edge = edges[0] if edges else None
    if type(edge) is not int or edge < 1 or any(other != edge for other in edges):
        raise _invalid(
            f"size is {sizes[0]} and crop_size {sizes[1]}; they must have one edge of at least 1 "
            "pixel, because images are squares"
        )
    return edge


def _invalid(problem: str) -> InputError:
    return InputError(f"{problem}.", ErrorCode.INVALID_VALUE)
