"""Pixels equal those of the authors' code; settings are saved and loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.image_square import to_square
from tests.errors import raises_input_error

GOLDEN = Path(__file__).parent.parent / "golden" / "image"
NAMES = [entry["file"] for entry in json.loads((GOLDEN / "images.json").read_text())]


def gradient(size: tuple[int, int] = (12, 8)) -> Image.Image:
    red = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    return Image.fromarray(np.stack([red, red[::-1], 255 - red], -1).astype(np.uint8))


@pytest.mark.parametrize("policy", ["resize", "pad"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_pixels(name, policy):
    config = json.loads((GOLDEN / "preprocessor_config.json").read_text())
    processor = Owl2ImageProcessor.from_dict({**config, "image_policy": policy})
    pixels = processor(GOLDEN / name)["pixel_values"]
    expected = load_file(GOLDEN / "pixels.safetensors")[f"{name[0]}.{policy}"]
    assert pixels.shape == (1, 3, 56, 56)
    assert np.abs(pixels[0].numpy() - expected).max() < 1e-6


def test_released_settings_mean_resize():
    config = json.loads((GOLDEN / "preprocessor_config.json").read_text())
    processor = Owl2ImageProcessor.from_dict(config)
    assert (processor.edge, processor.image_policy) == (56, "resize")


def test_clip_processor_loads_the_settings(tmp_path):
    ours = Owl2ImageProcessor(28, image_policy="pad", max_pixels=10_000)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_dict()))
    theirs = CLIPImageProcessor.from_pretrained(tmp_path)
    square = gradient(size=(40, 40))
    expected = theirs(to_square(square, 28, "pad", ours.image_mean), return_tensors="np")[
        "pixel_values"
    ]
    np.testing.assert_allclose(
        ours(square, return_tensors="np")["pixel_values"], expected, atol=2e-6
    )
    again = Owl2ImageProcessor.from_dict(ours.to_dict())
    assert again.to_dict() == ours.to_dict()
    assert (again.image_policy, again.max_pixels) == ("pad", 10_000)


@pytest.mark.parametrize(
    "change",
    [
        {"resample": "cubic"},
        {"do_resize": False},
        {"size": {"shortest_edge": 64}},
        {"crop_size": {"height": 56, "width": 28}},
        {"image_policy": "squash"},
        {"image_std": [0.0, 1.0, 1.0]},
        {"crop_size": None, "size": None},
        {"size": [1, 2]},
        {"size": {"height": [], "width": 56}},
        {"image_mean": 5},
        {"image_mean": ["a", "b", "c"]},
        {"image_std": {"r": 1}},
        {"max_pixels": "many"},
        {"max_pixels": 0},
        {"rescale_factor": "x"},
        {"rescale_factor": None},
    ],
)
def test_unsupported_settings_are_rejected(change):
    config = {**Owl2ImageProcessor(56).to_dict(), **change}
    with raises_input_error(
        ErrorCode.INVALID_CONFIG, "preprocessor_config.json", next(iter(change))
    ):
        Owl2ImageProcessor.from_dict(config)


def test_position_in_a_list_is_named():
    with raises_input_error(ErrorCode.MISSING_IMAGE, "Image 2 of 2", "gone.png"):
        Owl2ImageProcessor(8)([gradient(), "gone.png"])


def test_input_image_is_not_modified():
    image = gradient()
    before = image.copy()
    first = Owl2ImageProcessor(16, image_policy="pad")(image)["pixel_values"]
    again = Owl2ImageProcessor(16, image_policy="pad")(image)["pixel_values"]
    assert (np.asarray(image) == np.asarray(before)).all() and torch.equal(first, again)


def test_max_pixels():
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "12×8 = 96", 95):
        Owl2ImageProcessor(8, max_pixels=95)(gradient())
    assert (
        Owl2ImageProcessor(8, max_pixels=96)(gradient(), return_tensors="np")["pixel_values"].shape[
            0
        ]
        == 1
    )


def test_options_of_a_call():
    """As in transformers: what a call passes replaces the options of the processor."""
    processor, image = Owl2ImageProcessor(8), gradient(size=(8, 8))
    array = np.asarray(image)
    plain = {"do_normalize": False, "do_rescale": False}
    levels = torch.from_numpy(array.copy()).permute(2, 0, 1).float()
    for source in (image, array, torch.from_numpy(array.copy())):
        assert torch.equal(processor(source, **plain).pixel_values[0], levels)
    floats = processor(array / 255, **plain).pixel_values[0]
    assert torch.equal(floats, processor(array, do_normalize=False).pixel_values[0])
    negative = processor(image, do_normalize=False, rescale_factor=-1.0).pixel_values[0]
    assert torch.equal(negative, -levels)
    assert processor(image, image_mean=[0.0] * 3, image_std=[1.0] * 3).pixel_values.min() == 0
    first = array.transpose(2, 0, 1)
    changed = processor(first, input_data_format="channels_first", **plain).pixel_values[0]
    assert torch.equal(changed, levels)
    wide = gradient(size=(12, 8))
    padded = processor([[wide], [image]], image_policy="pad").pixel_values
    assert torch.equal(padded[:1], Owl2ImageProcessor(8, "pad")(wide).pixel_values)
    assert processor.image_policy == "resize" and padded.shape == (2, 3, 8, 8)
    nearest = processor(wide, resample=0, **plain).pixel_values
    assert not torch.equal(nearest, processor(wide, **plain).pixel_values)
    with pytest.raises(TypeError, match="polcy"):
        processor(image, polcy="pad")


def test_loading_and_saving_as_in_transformers(tmp_path):
    processor = Owl2ImageProcessor(8, "pad", max_pixels=100)
    processor.save_pretrained(tmp_path)
    for backend in ({}, {"use_fast": True}, {"backend": "torchvision"}, {"backend": "pil"}):
        again = AutoImageProcessor.from_pretrained(tmp_path, **backend)
        assert type(again) is Owl2ImageProcessor and again.to_dict() == processor.to_dict()
    changed = Owl2ImageProcessor.from_pretrained(tmp_path, do_normalize=False, size=4)
    assert (changed.do_normalize, changed.edge) == (False, 4)
    assert Owl2ImageProcessor().edge == 448
