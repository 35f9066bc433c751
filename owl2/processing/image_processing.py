"""Images to pixels.

::

    path, URL, PIL, bytes, data URI, array ──load_image──► RGB image
    RGB image ──policy──► square ──bicubic──► (size, size) ──CLIP mean and std──► (3, size, size)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import DEFAULT_MAX_PIXELS, Alpha, check_max_pixels, load_image

ImagePolicy = Literal["resize", "pad"]
POLICIES: tuple[ImagePolicy, ...] = ("resize", "pad")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BICUBIC = 3  # Pillow's code, the value of `resample` in preprocessor_config.json
# Settings of preprocessor_config.json that have one supported value.
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": _BICUBIC}


class Owl2ImageProcessor:
    """Images to normalized pixels, as in a checkpoint's ``preprocessor_config.json``.

    Specification §1.5.

    Args:
        size: Edge of the square input of the model in pixels.
        policy: For images that are not square. "resize" stretches them to a square of the longer
            edge; "pad" centers them in a square filled with the mean color.
        max_pixels: Limit of `load_image`.

    Attributes:
        alpha: For transparent images, see `load_image`; evaluation sets it to "drop".
    """

    alpha: Alpha = "white"

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size: int,
        policy: str = "resize",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if policy not in POLICIES:
            raise InputError(
                f"image_policy is {policy!r}; choose from {', '.join(POLICIES)}.",
                ErrorCode.INVALID_VALUE,
            )
        if not (isinstance(size, int) and not isinstance(size, bool) and size > 0):
            raise InputError(
                f"The image size is {size!r}; it must be an integer of at least 1.",
                ErrorCode.INVALID_VALUE,
            )
        if not (_are_three(image_mean) and _are_three(image_std) and min(image_std) > 0):
            raise InputError(
                f"image_mean {image_mean} and image_std {image_std} must have 3 values each, those "
                "of image_std above 0.",
                ErrorCode.INVALID_VALUE,
            )
        self.size = size
        self.policy = policy
        self.image_mean = tuple(float(value) for value in image_mean)
        self.image_std = tuple(float(value) for value in image_std)
        self.max_pixels = check_max_pixels(max_pixels)
        # The normalized value of each level and channel, computed in the order of CLIP's processor
        # (scale, shift, divide, in float32). A lookup replaces three passes over the image.
        levels = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
        self._levels = [
            ((levels - np.float32(mean)) / np.float32(std)).astype(np.float32)
            for mean, std in zip(self.image_mean, self.image_std, strict=True)
        ]

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Any]:
        """One image or a list of images to ``{"pixel_values": (N, 3, size, size)}`` in float32.

        Args:
            return_tensors: "pt" (torch) or "np".

        Raises:
            InputError: See `load_image`. The message has the position of the image in the list.
        """
        if return_tensors not in ("pt", "np", None):
            raise InputError(
                f"return_tensors is {return_tensors!r}; choose from pt, np.",
                ErrorCode.INVALID_VALUE,
            )
        batch = list(images) if isinstance(images, (list, tuple)) else [images]
        pixels = np.empty((len(batch), 3, self.size, self.size), dtype=np.float32)
        for index, source in enumerate(batch):
            try:
                image = load_image(source, self.max_pixels, self.alpha)
            except InputError as error:
                where = f"Image {index + 1} of {len(batch)}: " if len(batch) > 1 else ""
                raise InputError(f"{where}{error}", error.code) from error
            self._fill(image, pixels[index])
        if return_tensors == "np":
            return {"pixel_values": pixels}
        import torch  # here, because the server's image decoders run without torch

        return {"pixel_values": torch.from_numpy(pixels)}

    def to_square(self, image: Image.Image) -> Image.Image:
        """Convert an RGB image to the (size, size) RGB image for the model."""
        edge = max(image.size)
        if image.width != image.height:
            if self.policy == "resize":
                image = image.resize((edge, edge), Image.Resampling.BICUBIC)
            else:
                color = tuple(int(value * 255) for value in self.image_mean)
                canvas = Image.new("RGB", (edge, edge), color)
                canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
                image = canvas
        if edge == self.size:
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _fill(self, image: Image.Image, pixels: np.ndarray) -> None:
        colors = np.asarray(self.to_square(image))  # (size, size, 3)
        for channel, levels in enumerate(self._levels):
            np.take(levels, colors[..., channel], out=pixels[channel], mode="clip")

    # ------------------------------------------------------------------ preprocessor_config.json

    def to_dict(self) -> dict[str, Any]:
        """``preprocessor_config.json``: the keys of a CLIPImageProcessor, and two of owl2."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": _BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "image_policy": self.policy,
            "max_pixels": self.max_pixels,
        }

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], default_policy: str = "resize"
    ) -> "Owl2ImageProcessor":
        """The processor of a ``preprocessor_config.json``.

        Args:
            default_policy: For files without a policy, see `select_image_policy`.

        Raises:
            InputError: A setting requires other pixels than this class computes.
        """
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise _unsupported(f"{key} is {config[key]!r}; only {value!r} is supported")
        factor = config.get("rescale_factor", 1 / 255)
        if not (_is_finite(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6)):
            raise _unsupported(f"rescale_factor is {factor!r}, not 1/255")
        try:
            return cls(
                size=_edge(config),
                policy=config.get("image_policy", default_policy),
                image_mean=config.get("image_mean", CLIP_MEAN),
                image_std=config.get("image_std", CLIP_STD),
                max_pixels=config.get("max_pixels", DEFAULT_MAX_PIXELS),
            )
        except InputError as error:
            raise _unsupported(str(error)) from error

    def replace(self, policy: str | None, max_pixels: int | None) -> "Owl2ImageProcessor":
        """A copy with another policy or limit; None keeps the value."""
        return type(self)(
            self.size,
            self.policy if policy is None else policy,
            self.image_mean,
            self.image_std,
            self.max_pixels if max_pixels is None else max_pixels,
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_three(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_finite, values))


def _edge(config: Mapping[str, Any]) -> int:
    """The edge of the square in `crop_size` and `size`, which are integers or dicts."""
    sizes = [config.get("size")]
    if config.get("do_center_crop", config.get("crop_size") is not None):
        sizes.insert(0, config.get("crop_size"))
    edges: list[Any] = []
    for size in sizes:
        if size is not None:
            edges += size.values() if isinstance(size, Mapping) else [size]
    edge = edges[0] if edges else None
    if not isinstance(edge, int) or any(other != edge for other in edges):
        raise _unsupported(
            f"size is {config.get('size')!r} and crop_size {config.get('crop_size')!r}; they must "
            "have one edge in pixels, because images are squares"
        )
    return edge


def _unsupported(problem: str) -> InputError:
    return InputError(f"preprocessor_config.json: {problem}", ErrorCode.INVALID_CONFIG)
