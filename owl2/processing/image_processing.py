"""Images → pixels.

::

    path, URL, PIL, bytes, data-URI, array ──load_image──► RGB image
    RGB image ──policy──► square ──bicubic──► (size, size) ──CLIP mean and std──► (3, size, size)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from owl2.errors import InputError
from owl2.processing.image_io import DEFAULT_MAX_PIXELS, check_max_pixels, load_image

ImagePolicy = Literal["resize", "pad"]
POLICIES: tuple[ImagePolicy, ...] = ("resize", "pad")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BICUBIC_CODE = 3  # Pillow's number for bicubic, as `resample` in preprocessor_config.json


class Owl2ImageProcessor:
    """Images → normalised pixels, as `preprocessor_config.json` of a checkpoint says (SPEC 1.5).

    `size`: edge of the square that the model sees, in pixels. `policy`: what happens to an image
    that is no square: `resize` stretches it to a square of its longer edge, `pad` puts it in the
    middle of one filled with the mean colour. `max_pixels`: the limit of `load_image`.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size: int,
        policy: ImagePolicy = "resize",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if policy not in POLICIES:
            raise InputError(
                f"image_policy is {policy!r}; it must be one of {', '.join(POLICIES)}."
            )
        if not (isinstance(size, int) and not isinstance(size, bool) and size > 0):
            raise InputError(f"The image size is {size!r}; it must be a number of pixels above 0.")
        if not (_are_three(image_mean) and _are_three(image_std) and min(image_std) > 0):
            raise InputError(
                f"image_mean {image_mean} and image_std {image_std} must hold 3 numbers each, "
                "those of image_std above 0."
            )
        self.size = size
        self.policy = policy
        self.image_mean = tuple(float(value) for value in image_mean)
        self.image_std = tuple(float(value) for value in image_std)
        self.max_pixels = check_max_pixels(max_pixels)
        # One entry a grey level and channel, computed as CLIP's processor computes a pixel (scale,
        # shift, divide, in float32): a look-up instead of three passes over the image.
        levels = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
        self._levels = [
            ((levels - np.float32(mean)) / np.float32(std)).astype(np.float32)
            for mean, std in zip(self.image_mean, self.image_std, strict=True)
        ]

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Any]:
        """One image or a list of them → `{"pixel_values": (N, 3, size, size) float32}`.

        `return_tensors`: "pt" (torch) or "np". Raises `InputError` naming the image's place in
        the list.
        """
        batch = list(images) if isinstance(images, (list, tuple)) else [images]
        pixels = np.empty((len(batch), 3, self.size, self.size), dtype=np.float32)
        for index, source in enumerate(batch):
            try:
                image = load_image(source, self.max_pixels)
            except InputError as error:
                if len(batch) == 1:
                    raise
                raise InputError(
                    f"Image {index + 1} of {len(batch)}: {error}", error.code
                ) from error
            self._fill(image, pixels[index])
        if return_tensors == "np":
            return {"pixel_values": pixels}
        if return_tensors in ("pt", None):
            import torch  # only here: the server's decoders do without

            return {"pixel_values": torch.from_numpy(pixels)}
        raise InputError(f"return_tensors is {return_tensors!r}; images come as 'pt' or 'np'.")

    def to_square(self, image: Image.Image) -> Image.Image:
        """An RGB image → the (size, size) RGB image that the model sees."""
        edge = max(image.size)
        if image.width != image.height:
            if self.policy == "resize":
                image = image.resize((edge, edge), Image.Resampling.BICUBIC)
            else:
                canvas = Image.new(
                    "RGB", (edge, edge), tuple(int(value * 255) for value in self.image_mean)
                )
                canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
                image = canvas
        if edge == self.size:
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _fill(self, image: Image.Image, pixels: np.ndarray) -> None:
        colours = np.asarray(self.to_square(image))  # (size, size, 3)
        for channel, levels in enumerate(self._levels):
            np.take(levels, colours[..., channel], out=pixels[channel], mode="clip")

    # -------------------------------------------------------------- preprocessor_config.json

    def to_dict(self) -> dict[str, Any]:
        """`preprocessor_config.json`: the released keys, as a CLIPImageProcessor reads them, and
        our two."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": _BICUBIC_CODE,
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
    def from_dict(cls, config: Mapping[str, Any]) -> "Owl2ImageProcessor":
        """`preprocessor_config.json` → the processor; without our keys the policy is `resize`, as
        the authors advise.

        Raises `InputError` for settings that would give other pixels than this class computes.
        """
        expected = {
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": _BICUBIC_CODE,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise _unsupported(f"{key} is {config[key]!r}; only {value!r} is supported")
        factor = config.get("rescale_factor", 1 / 255)
        if not (_is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6)):
            raise _unsupported(f"rescale_factor is {factor!r}, not 1/255")
        size = _edge(config)
        try:
            return cls(
                size=size,
                policy=config.get("image_policy", "resize"),
                image_mean=config.get("image_mean", CLIP_MEAN),
                image_std=config.get("image_std", CLIP_STD),
                max_pixels=config.get("max_pixels", DEFAULT_MAX_PIXELS),
            )
        except InputError as error:
            raise InputError(f"preprocessor_config.json: {error}", error.code) from error

    def replace(self, policy: ImagePolicy | None, max_pixels: int | None) -> "Owl2ImageProcessor":
        """The same with another policy or limit; None keeps it."""
        return type(self)(
            self.size,
            self.policy if policy is None else policy,
            self.image_mean,
            self.image_std,
            self.max_pixels if max_pixels is None else max_pixels,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_three(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_number, values))


def _edge(config: Mapping[str, Any]) -> int:
    """The edge of the square that `crop_size` and `size` (a number or a dict each) agree on."""
    edges = {
        key: list(given.values()) if isinstance(given, Mapping) else [given]
        for key in ("crop_size", "size")
        if (given := config.get(key)) is not None
    }
    if not config.get("do_center_crop", "crop_size" in edges):
        edges.pop("crop_size", None)
    found = [edge for given in edges.values() for edge in given]
    edge = found[0] if found else None
    if not isinstance(edge, int) or any(other != edge for other in found):
        raise _unsupported(
            f"size is {config.get('size')!r} and crop_size {config.get('crop_size')!r}; they must "
            "name one edge in pixels, as images are squares before they are resized"
        )
    return edge


def _unsupported(what: str) -> InputError:
    return InputError(f"preprocessor_config.json: {what}.")
