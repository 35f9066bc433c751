"""The modules of `recipes/study`, which import each other as scripts of one directory, and packages
like those that it fetches."""

import gzip
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

RECIPES = Path(__file__).parents[2] / "recipes" / "study"
sys.path += [str(RECIPES), str(RECIPES.parent / "small")]

EXAM = """T0A0{number} (B)
What is the safe way number {number}?
A. Touching number {number}
B. Reading number {number}
C. Hoping number {number}
D. All of these choices are correct
"""
PARAGRAPH = (
    "The package number {number} contains a program that draws circles. It is free software, and "
    "anyone may change it. Its manual describes all of its options in alphabetical order.\n\n"
)
COLORS = ("RED", "BLUE", "GREEN", "ORANGE", "PURPLE", "BROWN")


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A directory with unpacked packages of few files each."""
    root = tmp_path_factory.mktemp("packages")
    unpacked = root / "unpacked"
    assets = unpacked / "fluent-emoji" / "package" / "assets"
    assets.mkdir(parents=True)
    titles = set()
    rng = np.random.default_rng(0)
    for code in range(0x1F400, 0x1F43C):  # animals
        name = unicodedata.name(chr(code))
        titles |= set(name.lower().replace("-", " ").split())
        blocks = rng.integers(0, 256, (4, 4, 4), np.uint8)
        blocks[..., 3] = 255
        image = Image.fromarray(blocks, "RGBA").resize((64, 64), Image.Resampling.NEAREST)
        image.save(assets / f"{code:x}.webp", lossless=True)
    words = unpacked / "words" / "usr/share/dict"
    words.mkdir(parents=True)
    (words / "american-english").write_text("\n".join(sorted(titles)))
    _write_fashion(unpacked / "fashion-mnist" / "usr/share/datasets/fashion-mnist", rng)
    _write_easy_vqa(unpacked / "easy-vqa" / "easy_vqa" / "data")
    text = "".join(PARAGRAPH.format(number=number) for number in range(60))
    for name, file in (
        ("debian-faq", "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"),
        ("developers-reference", "usr/share/developers-reference/developers-reference.txt.gz"),
    ):
        _write_gzip(unpacked / name / file, text)
    terms = "".join(f"\n{word}\n n.\n\n    A word.\n" for word in ("foobar", "back door", "bit"))
    _write_gzip(unpacked / "jargon" / "usr/share/dictd/jargon.dict.dz", terms)
    exam = unpacked / "hamexam" / "usr/share/hamexam" / "T"
    exam.mkdir(parents=True)
    for number in range(4):
        (exam / f"T0A0{number}").write_text(EXAM.format(number=number))
    return root


def _write_gzip(path, text):
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(text.encode() if isinstance(text, str) else text))


def _write_fashion(folder, rng):
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        labels = np.arange(50, dtype=np.uint8) % 10
        pixels = rng.integers(0, 256, (50, 28, 28), np.uint8)
        for kind, header, array in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + array.tobytes())
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(content)


def _write_easy_vqa(folder):
    for split in ("train", "test"):
        images = folder / split / "images"
        images.mkdir(parents=True)
        questions = []
        for number, color in enumerate(COLORS):
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).ellipse((9, 9, 50, 50), color.lower())
            image.save(images / f"{number}.png")
            questions.append(("what color is the circle?", color.lower(), number))
            questions.append(("what shape is in the image?", "circle", number))
        (folder / split / "questions.json").write_text(json.dumps(questions))


@pytest.fixture
def fake_answers(monkeypatch):
    """Answers of the starting model without the model; returns the function."""
    return _patch_answers(monkeypatch)


def _patch_answers(patch):
    import data

    def answers(engine, requests, seed):
        return [None if len(text) % 5 == 0 else f"About {text[:9]}." for text in requests]

    patch.setattr(data, "starting_engine", lambda file: None)
    patch.setattr(data, "smollm2_file", lambda *_: None)
    patch.setattr(data, "answers", answers)
    return answers


@pytest.fixture(scope="session")
def study_data(packages, tmp_path_factory):
    """The small data of the study from `packages`."""
    from data import create_data

    with pytest.MonkeyPatch.context() as patch:
        _patch_answers(patch)
        folder = tmp_path_factory.mktemp("study") / "data"
        create_data(folder, packages, small=True)
    return folder
