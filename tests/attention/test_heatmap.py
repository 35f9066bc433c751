"""Heat maps: which tokens a word is, where they land on the image, and how that is painted."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from owl2.attention import Looks, Span, heat_map, overlay, share_of, words_of
from owl2.attention.heatmap import patch_map, tokens_of
from owl2.errors import InputError

TOKENS = (" a", " gre", "en", " circle", ",", " ", "", "你", "好")


@pytest.fixture
def looks():
    """Two images of two queries on a grid of 2 x 2. Of image 0, query 0 is all of the patch
    above on the right, query 1 of the one below on the left; token t looks at query t % 2."""
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
    patches[1, :, 0] = 0.4  # of CLS
    patches[1, :, 4] = 0.1
    return Looks(
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


def test_words_and_their_tokens(looks):
    assert words_of(looks) == [
        ("a", (0, 1)),
        ("green", (1, 3)),
        ("circle", (3, 4)),
        ("你", (6, 8)),
        ("好", (8, 9)),
    ]


@pytest.mark.parametrize(
    ("words", "tokens"),
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
def test_tokens_of_words(looks, words, tokens):
    assert tokens_of(looks, words) == tokens


def test_a_whole_word_comes_before_a_part_of_another(looks):
    said = dataclasses.replace(looks, tokens=(" reddish", " red"))
    assert tokens_of(said, "red") == (1, 2)


@pytest.mark.parametrize("words", ["blue", "", " ", (3, 3), (-1, 2), (8, 10)])
def test_words_that_are_not_there(looks, words):
    with pytest.raises(InputError, match=r"not in the answer, which is: a green|There are no tok"):
        heat_map(looks, words)


def test_the_patch_that_a_word_comes_from(looks):
    np.testing.assert_allclose(patch_map(looks, (0, 1), layer=3), [[0, 4], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(patch_map(looks, (1, 2), layer=3), [[0, 0], [4, 0]], atol=1e-6)
    np.testing.assert_allclose(patch_map(looks, (0, 2), layer=3), [[0, 2], [2, 0]], atol=1e-6)
    assert patch_map(looks, (0, 1)).mean() == pytest.approx(1)


def test_another_image_and_another_layer(looks):
    looks.attention[0, :, :, 5:7] = 0.1
    np.testing.assert_allclose(patch_map(looks, None, 1, layer=3), [[0, 0], [0, 4]], atol=1e-6)
    for wrong in (2, -1):
        with pytest.raises(InputError, match=r"no image -?\d; 2 were given"):
            heat_map(looks, image=wrong)
    with pytest.raises(InputError, match="Layer 0 was not kept; there are 3"):
        heat_map(looks, layer=0)


def test_share_of_a_image(looks):
    """What is on the end of an image is on it, too."""
    assert share_of(looks, "green", 0) == pytest.approx(0.4)
    assert share_of(looks, "green", 1) == 0


def test_a_map_has_the_shape_of_the_image(looks):
    heat = heat_map(looks, (0, 1), layer=3)
    assert heat.shape == (20, 40) and heat.dtype == np.float32
    assert np.unravel_index(heat.argmax(), heat.shape)[0] < 10  # above
    assert np.unravel_index(heat.argmax(), heat.shape)[1] >= 20  # on the right
    assert heat.min() >= 0 and heat.mean() == pytest.approx(1, rel=0.02)


def test_margins_of_padded_images_are_cut_off(looks):
    """40 x 20 in the middle of 40 x 40: its upper half is the lower half of the upper patches."""
    padded = dataclasses.replace(looks, policy="pad")
    square = dataclasses.replace(padded, sizes=((40, 40), (30, 30)))
    heat = heat_map(padded, (0, 1), layer=3)
    assert heat.shape == (20, 40)
    np.testing.assert_allclose(heat, heat_map(square, (0, 1), layer=3)[10:30], atol=1e-6)


def test_large_images_have_smaller_maps(looks):
    large = dataclasses.replace(looks, sizes=((6000, 30), (30, 30)))
    assert heat_map(large).shape == (5, 1024)


def test_the_painted_image(looks):
    image = Image.new("RGB", (80, 40), (200, 220, 200))
    heat = heat_map(looks, (0, 1), layer=3)
    painted = overlay(image, heat)
    assert (painted.size, painted.mode) == (image.size, "RGB")
    high, low = painted.getpixel((70, 5)), painted.getpixel((5, 35))
    assert high[0] > 230 and high[2] < 110, "yellow"
    assert max(low) - min(low) <= 12 and min(low) > 200, "as it was, but paler"


@pytest.mark.parametrize("heat", [np.ones((2, 2)), np.array([[0.9, 1.05], [1.0, 1.05]])])
def test_a_map_that_is_nearly_even_paints_next_to_nothing(heat):
    """Not stretched to the full colours, as if the model had looked somewhere."""
    painted = np.asarray(overlay(Image.new("L", (8, 8), 100), heat.astype(np.float32)), int)
    assert np.abs(painted - 100).max() <= 8
