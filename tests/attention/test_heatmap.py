"""Heatmaps: the tokens of a word, the map over the image, and the overlay."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from owl2.attention import (
    AttentionMaps,
    Span,
    answer_words,
    attention_share,
    heat_map,
    overlay,
)
from owl2.attention.heatmap import patch_map, token_range
from owl2.errors import ErrorCode
from tests.errors import raises_input_error

TOKENS = (" a", " gre", "en", " circle", ",", " ", "", "你", "好")


@pytest.fixture
def maps():
    """Two images, two queries, 2 x 2 patches. In image 0, query 0 is the upper right patch and
    query 1 the lower left one. Token t attends to query t % 2."""
    spans = (
        Span(0, 2, "text"),
        Span(2, 5, "image", 0),
        Span(5, 8, "image", 1),
        Span(8, 9, "text"),
        Span(9, 17, "answer"),
    )
    attention = np.zeros((1, 2, len(TOKENS), 17), np.float32)
    for token in range(len(TOKENS)):
        attention[0, :, token, 2 + token % 2] = 0.3
        attention[0, :, token, 4] = 0.1
        attention[0, :, token, 8] = 0.6
    patches = np.zeros((2, 2, 5), np.float32)
    patches[0, 0, 2] = patches[0, 1, 3] = 0.5
    patches[1, :, 0] = 0.4  # CLS
    patches[1, :, 4] = 0.1
    return AttentionMaps(
        tokens=TOKENS,
        prompt_tokens=("",) * 9,
        spans=spans,
        layers=(3,),
        attention=attention,
        mean=attention[0] / 2 + attention[0].mean(1, keepdims=True) / 2,
        shares=np.zeros((4, len(TOKENS), 5), np.float32),
        patches=patches,
        sizes=((40, 20), (30, 30)),
        policy="resize",
        use_mam=True,
    )


def test_answer_words(maps):
    assert answer_words(maps) == [
        ("a", (0, 1)),
        ("green", (1, 3)),
        ("circle", (3, 4)),
        ("你", (6, 8)),
        ("好", (8, 9)),
    ]


@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        ("green", (1, 3)),
        ("GREEN", (1, 3)),
        ("green circle", (1, 4)),
        (" circle ", (3, 4)),
        ("circ", (3, 4)),
        ("re", (1, 2)),
        ("你", (6, 8)),
        ("你好", (6, 9)),
        ((2, 4), (2, 4)),
        (None, (0, 9)),
    ],
)
def test_token_range(maps, target, tokens):
    assert token_range(maps, target) == tokens


def test_token_range_prefers_a_complete_word(maps):
    reddish = dataclasses.replace(maps, tokens=(" reddish", " red"))
    assert token_range(reddish, "red") == (1, 2)


@pytest.mark.parametrize("target", ["blue", "", " ", (3, 3), (-1, 2), (8, 10)])
def test_unknown_target_is_an_error(maps, target):
    needle = repr(target) if isinstance(target, str) else str(target[1])
    with raises_input_error(ErrorCode.INVALID_VALUE, needle):
        heat_map(maps, target)


def test_patch_map_of_tokens(maps):
    np.testing.assert_allclose(patch_map(maps, (0, 1), layer=3), [[0, 4], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(patch_map(maps, (1, 2), layer=3), [[0, 0], [4, 0]], atol=1e-6)
    np.testing.assert_allclose(patch_map(maps, (0, 2), layer=3), [[0, 2], [2, 0]], atol=1e-6)
    assert patch_map(maps, (0, 1)).mean() == pytest.approx(1)


def test_patch_map_selects_image_and_layer(maps):
    maps.attention[0, :, :, 5:7] = 0.1
    np.testing.assert_allclose(patch_map(maps, None, 1, layer=3), [[0, 0], [0, 4]], atol=1e-6)
    for wrong in (2, -1):
        with raises_input_error(ErrorCode.INVALID_VALUE, wrong, 2):
            heat_map(maps, image=wrong)
    with raises_input_error(ErrorCode.INVALID_VALUE, 0, [3]):
        heat_map(maps, layer=0)


def test_attention_share_includes_the_end_position(maps):
    assert attention_share(maps, "green", 0) == pytest.approx(0.4)
    assert attention_share(maps, "green", 1) == 0


def test_heat_map_has_the_aspect_ratio_of_the_image(maps):
    heat = heat_map(maps, (0, 1), layer=3)
    assert heat.shape == (20, 40) and heat.dtype == np.float32
    assert np.unravel_index(heat.argmax(), heat.shape)[0] < 10  # upper half
    assert np.unravel_index(heat.argmax(), heat.shape)[1] >= 20  # right half
    assert heat.min() >= 0 and heat.mean() == pytest.approx(1, rel=0.02)


def test_heat_map_cuts_off_the_margins_of_padded_images(maps):
    """A 40 x 20 image is padded to 40 x 40; the map is the middle of the map of the square."""
    padded = dataclasses.replace(maps, policy="pad")
    square = dataclasses.replace(padded, sizes=((40, 40), (30, 30)))
    heat = heat_map(padded, (0, 1), layer=3)
    assert heat.shape == (20, 40)
    np.testing.assert_allclose(heat, heat_map(square, (0, 1), layer=3)[10:30], atol=1e-6)


def test_heat_maps_of_large_images_are_smaller(maps):
    large = dataclasses.replace(maps, sizes=((6000, 30), (30, 30)))
    assert heat_map(large).shape == (5, 1024)


def test_overlay(maps):
    image = Image.new("RGB", (80, 40), (200, 220, 200))
    heat = heat_map(maps, (0, 1), layer=3)
    painted = overlay(image, heat)
    assert (painted.size, painted.mode) == (image.size, "RGB")
    high, low = painted.getpixel((70, 5)), painted.getpixel((5, 35))
    assert high[0] > 230 and high[2] < 110, "yellow"
    assert max(low) - min(low) <= 12 and min(low) > 200, "paler, not painted"


@pytest.mark.parametrize("heat", [np.ones((2, 2)), np.array([[0.9, 1.05], [1.0, 1.05]])])
def test_overlay_of_a_nearly_uniform_map(heat):
    """The values are not scaled up to the full range of colors."""
    painted = np.asarray(overlay(Image.new("L", (8, 8), 100), heat.astype(np.float32)), int)
    assert np.abs(painted - 100).max() <= 8
