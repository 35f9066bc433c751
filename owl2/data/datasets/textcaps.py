"""TextCaps: captions that require reading the text in the image."""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.coco import EMPTY_CAPTION, one_caption
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, json_object, known_split, published_file, require_split


def textcaps(
    source: Path, *, split: str = "train", file: str | None = None, seed: int = 0
) -> Iterator[Sample | SkippedRows]:
    """TextCaps: each image with one of its captions, chosen by `seed` and the image.

    Reads `TextCaps_0.1_train.json` (`split=val`: `TextCaps_0.1_val.json`) with a caption per row.
    The images of both splits are in `train_images/` (the archive `train_val_images.zip`).

    Raises:
        InputError: The file differs from the published one, or has the test split.
    """
    names = {name: f"TextCaps_0.1_{name}.json" for name in ("train", "val")}
    path = published_file(source, file, known_split("textcaps", split, names))
    content = json_object(path)
    require_split(content.value.get("dataset_type"), split, str(path))
    images: dict[str, list[str]] = {}
    for row in content.rows("data"):
        captions = images.setdefault(f"train_images/{row.text('image_id')}.jpg", [])
        if caption := row.text("caption_str"):
            captions.append(caption)
        else:
            yield SkippedRows(EMPTY_CAPTION)
    for image, captions in images.items():
        if captions:
            yield from one_caption(image, captions, path, seed)
