"""Titles, images and the split by title."""

import shutil

import pytest
from drawings import (
    Drawing,
    clean_title,
    draw,
    near_pairs,
    perceptual_hash,
    read_drawings,
    split_drawings,
)
from PIL import Image, ImageDraw, ImageOps
from questions import main_color

from owl2.errors import ErrorCode
from tests.errors import raises_input_error


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("A rabbit.", "rabbit"),
        ("Dog 03 Drawn With Straight Lines", "dog drawn with straight lines"),
        ("Corndog (B and W)", "corndog"),
        ("arrow-down-seagreen", "arrow down seagreen"),
        ("an owl &amp; a fish", ""),
        ("Clipart by Nicu Buculei - piggybank", ""),
        ("Etiquette Icons", ""),
        ("Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)", ""),
        ("Кролик", ""),
    ],
)
def test_titles_are_cleaned(text, title):
    assert clean_title(text) == title


def test_drawings_are_read_in_a_fixed_order(packages, monkeypatch):
    found = read_drawings(packages, False, ("fluent-emoji", "words"))
    assert found == read_drawings(packages, False, ("words", "fluent-emoji"))
    assert len(found) == 60 and {"rat", "water buffalo"} < {one.title for one in found}
    monkeypatch.setattr("drawings.MAX_WORDS", 0)
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        read_drawings(packages, False, ("fluent-emoji", "words"))


def test_titles_of_openclipart(packages, tmp_path):
    unpacked = tmp_path / "unpacked"
    shutil.copytree(packages / "unpacked" / "fluent-emoji", unpacked / "fluent-emoji")
    (unpacked / "words/usr/share/dict").mkdir(parents=True)
    (unpacked / "words/usr/share/dict/american-english").write_text("red\nkite\nrat\n")
    for folder, name, title in (
        ("animals/birds", "kite", "Red Kite"),
        ("unsorted", "kite", "Red Kite"),  # the same file
        ("recreation/toys", "kite_2", "A kite (B and W)"),
        ("people", "nib", "Nib"),  # not in the list of words
        ("computer/icons/lemon-theme/apps", "rat", "Rat"),
    ):
        for kind in ("svg", "png"):
            file = (
                unpacked / f"openclipart-{kind}/usr/share/openclipart/{kind}/{folder}/{name}.{kind}"
            )
            file.parent.mkdir(parents=True)
            file.write_text(f"<dc:title>{title}</dc:title>")
    names = ("fluent-emoji", "openclipart-svg", "openclipart-png", "words")
    found = {one.title: one.kind for one in read_drawings(tmp_path, False, names)}
    assert found == {"rat": "", "red kite": "animal", "kite": "toy"}


def shape(kind, box=(20, 20, 90, 70), color="navy", size=(112, 112)):
    image = Image.new("RGBA", size)
    getattr(ImageDraw.Draw(image), kind)(box, fill=color)
    return image


def test_transparent_images_are_drawn_on_white_in_the_center(tmp_path, monkeypatch):
    shape("rectangle", (3, 40, 60, 50)).save(tmp_path / "a.png")
    image = draw(tmp_path / "a.png")
    assert (image.size, image.mode) == ((112, 112), "RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((56, 56)) == (0, 0, 128)
    left, top, right, bottom = ImageOps.invert(image).getbbox()
    assert abs(left + right - 112) <= 1 and abs(top + bottom - 112) <= 1
    Image.new("RGBA", (9, 9)).save(tmp_path / "empty.png")
    with raises_input_error(ErrorCode.BROKEN_IMAGE, "empty.png"):
        draw(tmp_path / "empty.png")
    monkeypatch.setattr("drawings.MAX_PIXELS", 111 * 112)
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "a.png"):
        draw(tmp_path / "a.png")


def test_hash_differs_for_other_drawings_only(tmp_path):
    hashes = []
    for name, image in {
        "disk": shape("ellipse"),
        "larger": shape("ellipse", (40, 40, 180, 140), size=(224, 224)),
        "bar": shape("rectangle", (20, 50, 90, 56)),
        "pole": shape("rectangle", (20, 20, 26, 90)),
    }.items():
        image.save(tmp_path / f"{name}.png")
        hashes.append((perceptual_hash(draw(tmp_path / f"{name}.png")),))
    assert [*near_pairs(hashes)] == [(0, 1)]


def test_equal_titles_and_near_duplicates_are_on_one_side():
    titles = [f"thing {'abcdefghij'[n % 10]}{'klmno'[n // 10]}" for n in range(50)]
    drawings = [Drawing("emoji", None, title) for title in titles]
    # Each title also belongs to another drawing, and each of these resembles a third one.
    drawings += [Drawing("tuxpaint", None, f"{title.split()[1]} things") for title in titles]
    drawings += [Drawing("openclipart", None, f"object {n}") for n in range(50)]
    hashes = [(index * 0x9E3779B97F4A7C15 % 2**64,) for index in range(100)]
    hashes += [(one ^ 0b1011,) for (one,) in hashes[50:]]
    sides = split_drawings(drawings, hashes)
    assert sides[:50] == sides[50:100] == sides[100:]
    assert 3 <= sides[:50].count("test") <= 15 and "train" in sides
    assert sides == split_drawings(drawings, hashes)
    assert sides != split_drawings(drawings, hashes, seed=1)


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ("#1f4fd0", "blue"), ("#3fa9f5", "blue"), ("#d01010", "red"), ("#20a040", "green"),
        ("#ffcc22", "yellow"), ("#ff8800", "orange"), ("#6b3f12", "brown"), ("#7a2bb0", "purple"),
        ("#ff50b0", "pink"), ("#101010", "black"), ("#909090", "gray"), ("#ffffff", ""),
    ],
)  # fmt: skip
def test_main_color(color, name):
    image = Image.new("RGB", (20, 20), "white")
    ImageDraw.Draw(image).rectangle((4, 4, 15, 15), fill=color)
    assert main_color(image) == name
    ImageDraw.Draw(image).rectangle((4, 4, 15, 9), fill="#20a040" if name != "green" else "red")
    assert main_color(image) == ("green" if name == "" else "")
