"""Titled images: read from their packages, cleaned, drawn on white, and split by title.

    packages ──titles in English──► drawings ──square PNG on white, perceptual hash──► groups of
    equal titles and near-duplicates ──► train, validation, test

A group is on one side of the split. No test image is therefore in training, under its own title or
under another one.
"""

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from sources import unpack

from owl2.errors import ErrorCode, InputError

Split = Literal["train", "validation", "test"]

EDGE = 112  # pixels of the images and of the vision encoder
TEST, VALIDATION = 0.15, 0.04  # shares of the groups
MAX_SAME_TITLE = 6  # a more frequent title is the name of a collection
MAX_GROUP = 60  # a larger group is in training, so that it does not make up the test set
NEAR = 4  # bits of 64 in which the hashes of near-duplicates differ at most
MAX_WORDS = 4  # of a title
MAX_PIXELS = 30_000_000  # larger originals are not used
# Folders of openclipart with collections of similar images, or whose titles do not name the image.
NOT_USED = re.compile(
    r"-theme/|shapes/stars|special/|games/cards|signs_and_symbols/(flags|led|map_symbols)|"
    r"jigsaw|unsorted/duplicates|roadsigns|aiga-symbols|computer/(icons|buttons|folders)"
)
# The kinds of things, by the folders of openclipart and tuxpaint.
KINDS = {
    "animals": "animal", "bodypart": "body part", "buildings": "building", "building": "building",
    "clothes": "clothing", "clothing": "clothing", "food": "food", "hobbies": "hobby",
    "household": "household item", "medical": "medical item", "military": "weapon",
    "music": "musical instrument", "people": "person", "plants": "plant", "seasonal": "holiday",
    "space": "thing in space", "astronomy": "thing in space", "sports": "sport", "tools": "tool",
    "toys": "toy", "town": "building", "transportation": "vehicle", "vehicles": "vehicle",
    "weapons": "weapon", "weather": "weather", "naturalforces": "weather", "holiday": "holiday",
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """An image with its title.

    Attributes:
        source: Its package: `openclipart`, `tuxpaint` or `emoji`.
        path: The original.
        title: In lower case, without an article: "fire engine".
        kind: One of the values of `KINDS`, or "".
    """

    source: str
    path: Path
    title: str
    kind: str = ""

    @property
    def name(self) -> str:
        """Of the image in the data, without suffix."""
        digest = hashlib.sha256(str(self.path.name).encode()).hexdigest()[:6]
        return f"{self.source}/{self.title.replace(' ', '_')}_{digest}"


def read_drawings(packages: Path, any_version: bool, sources: Sequence[str]) -> list[Drawing]:
    """All usable drawings of some sources in a fixed order; each title in English.

    Raises:
        InputError: A package cannot be fetched; there are no usable drawings.
    """
    words = unpack("words", packages, any_version) / "usr/share/dict/american-english"
    known = {word for word in words.read_text("utf-8").split() if word.islower()}
    folders = {name: unpack(name, packages, any_version) for name in sources}
    found = [*_emoji(folders["fluent-emoji"])]
    if "openclipart-svg" in folders:
        found += _openclipart(folders["openclipart-svg"], folders["openclipart-png"])
    if "tuxpaint" in folders:
        found += _tuxpaint(folders["tuxpaint"])
    titles = Counter((one.source, one.title) for one in found)
    usable = [
        one
        for one in found
        if titles[one.source, one.title] <= MAX_SAME_TITLE
        and 0 < len(one.title.split()) <= MAX_WORDS
        and all(word in known for word in one.title.split())
    ]
    if not usable:
        raise InputError(f"{packages} contains no drawings.", ErrorCode.EMPTY_DATASET)
    # A file can be in several folders.
    unique = {one.name: one for one in reversed(usable)}
    return [unique[name] for name in sorted(unique)]


def clean_title(text: str) -> str:
    """The title in lower case without article, numbers, authors and remarks; "" if unusable."""
    text = unicodedata.normalize("NFKC", html.unescape(text))
    if re.search(r"clipart by|collection|theme|\bicons?\b|symbol signs|submission", text, re.I):
        return ""
    text = re.sub(r"\([^)]*\)|[_\-/]|\b\w*\d\w*\b", " ", text.partition(" - ")[0])
    text = re.sub(r"^(an?|the|some)\s+", "", " ".join(text.lower().split()).rstrip(". "))
    return text if re.fullmatch(r"[a-z]{2,}( [a-z]+)*", text) else ""


def _kind(parts: Sequence[str]) -> str:
    """That of the innermost folder that has one."""
    return next((KINDS[part] for part in reversed(parts) if part in KINDS), "")


def _openclipart(svg: Path, png: Path) -> Iterator[Drawing]:
    svg, png = svg / "usr/share/openclipart/svg", png / "usr/share/openclipart/png"
    for file in sorted(svg.rglob("*.svg")):
        relative = file.relative_to(svg)
        image = (png / relative).with_suffix(".png")
        if file.is_symlink() or NOT_USED.search(str(relative)) or not image.is_file():
            continue
        match = re.search(r"<dc:title>(.*?)</dc:title>", file.read_text("utf-8", "replace"), re.S)
        if match and (title := clean_title(match[1])):
            yield Drawing("openclipart", image, title, _kind(relative.parts[:-1]))


def _tuxpaint(folder: Path) -> Iterator[Drawing]:
    root = folder / "usr/share/tuxpaint/stamps"
    for file in sorted(root.rglob("*.txt")):
        image = file.with_suffix(".png")
        first = file.read_text("utf-8", "replace").partition("\n")[0]
        if image.is_file() and (title := clean_title(first)):
            yield Drawing("tuxpaint", image, title, _kind(file.relative_to(root).parts[:-1]))


def _emoji(folder: Path) -> Iterator[Drawing]:
    """Emoji of one character: their names are those of Unicode."""
    for file in sorted((folder / "package/assets").glob("*.webp")):
        codes = [code for code in file.stem.split("-") if code != "fe0f"]
        if len(codes) == 1 and (name := unicodedata.name(chr(int(codes[0], 16)), "")):
            if int(codes[0], 16) < 0x1F000:
                name = re.sub(r"\b(HEAVY|BLACK|WHITE)\b", "", name)  # of the font, not of the emoji
            if not re.search(r"SQUARED|CIRCLED|IDEOGRAPH|LATIN|KATAKANA", name):
                yield Drawing("emoji", file, clean_title(name))


# ------------------------------------------------------------------ images


def draw(path: Path, edge: int = EDGE) -> Image.Image:
    """The visible part of an image, square on white, in RGB.

    Raises:
        InputError: The file is not an image, it is too large, or nothing is visible.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{path} has more than {MAX_PIXELS} pixels.", ErrorCode.IMAGE_TOO_LARGE
                )
            image = opened.convert("RGBA")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: {error}", ErrorCode.BROKEN_IMAGE) from error
    image.thumbnail((4 * edge, 4 * edge))
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    rgb = canvas.convert("RGB")
    box = ImageOps.invert(rgb).getbbox()
    if box is None:
        raise InputError(f"{path} is white.", ErrorCode.BROKEN_IMAGE)
    margin = edge // 16
    size = (edge - 2 * margin, edge - 2 * margin)
    return ImageOps.expand(ImageOps.pad(rgb.crop(box), size, color="white"), margin, "white")


_DCT = np.cos(np.pi / 32 * (np.arange(32)[None] + 0.5) * np.arange(8)[:, None])  # (8, 32)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which low frequencies of the gray image are positive.

    The frequencies of a symmetric drawing that are zero up to rounding count as negative.
    """
    gray = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = (_DCT @ gray @ _DCT.T).ravel()
    bits = low > np.abs(low[1:]).max() / 50
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


# ------------------------------------------------------------------ split


def title_key(title: str) -> str:
    """Equal for titles that differ only in the order and the plurals of words."""
    return " ".join(sorted(word.removesuffix("s") for word in title.split()))


def split_drawings(
    drawings: Sequence[Drawing], hashes: Sequence[tuple[int, ...]], seed: int = 0
) -> list[Split]:
    """The side of each drawing; drawings with equal titles or near hashes are on the same one.

    Args:
        hashes: Of each drawing one or more, such as those of the image and its mirror image.
    """
    parent = list(range(len(drawings)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    by_title: dict[str, int] = {}
    for index, drawing in enumerate(drawings):
        parent[root(index)] = root(by_title.setdefault(title_key(drawing.title), index))
    for first, second in near_pairs(hashes):
        parent[root(first)] = root(second)
    groups: dict[int, list[int]] = {}
    for index in range(len(drawings)):
        groups.setdefault(root(index), []).append(index)
    sides: list[Split] = ["train"] * len(drawings)
    for members in groups.values():
        key = min(title_key(drawings[index].title) for index in members)
        draw_ = int(hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()[:8], 16) / 16**8
        side: Split = "test" if draw_ < TEST else "train"
        side = "validation" if TEST <= draw_ < TEST + VALIDATION else side
        for index in members if len(members) <= MAX_GROUP else ():
            sides[index] = side
    return sides


def near_pairs(hashes: Iterable[tuple[int, ...]], near: int = NEAR) -> Iterator[tuple[int, int]]:
    """Pairs of indices of which some hashes differ in at most `near` bits."""
    owners, values = [], []
    for index, own in enumerate(hashes):
        owners += [index] * len(own)
        values += own
    numbers = np.array(values, np.uint64)
    for position, value in enumerate(numbers):
        distance = np.bitwise_count(numbers[position + 1 :] ^ value)
        for other in np.flatnonzero(distance <= near) + position + 1:
            if owners[position] != owners[other]:
                yield owners[position], owners[other]
