from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import (
    CAPTION,
    put,
    split_skipped,
    summarize,
    summarize_all,
)
from tests.errors import raises_input_error

textcaps = partial(read_published, "textcaps")
A, B = "054c394fcc4bfa1e", "8a9b7c6d5e4f3210"


def published(*captions: tuple[str, str], split: str = "train") -> dict:
    references = {
        image: [text for name, text in captions if name == image] for image, _ in captions
    }
    return {
        "dataset_type": split,
        "dataset_name": "textcaps",
        "dataset_version": "0.1",
        "data": [
            {
                "caption_str": text,
                "image_id": image,
                "image_classes": ["Bottle"],
                "flickr_original_url": f"https://c1.staticflickr.com/{image}_o.jpg",
                "flickr_300k_url": f"https://c1.staticflickr.com/{image}_z.jpg",
                "image_width": 1024,
                "image_height": 768,
                "set_name": split,
                "image_name": image,
                "image_path": f"{split}/{image}.jpg",
                "caption_id": place,
                "caption_tokens": text.split(),
                "reference_strs": references[image],
                "reference_tokens": [each.split() for each in references[image]],
            }
            for place, (image, text) in enumerate(captions)
        ],
    }


CAPTIONS = [(A, "A bottle of ale. "), (B, "A sign that says stop."), (A, "Beer"), (A, "An ale")]


def test_one_caption_per_image_by_seed(tmp_path):
    put(tmp_path, "TextCaps_0.1_train.json", published(*CAPTIONS))
    drawn = set()
    for seed in range(20):
        first, second = summarize_all(textcaps(tmp_path, seed=seed))
        assert [first, second] == summarize_all(textcaps(tmp_path, seed=seed))
        assert second == (
            f"train_images/{B}.jpg",
            [(f"<|image|>\n{CAPTION}", "A sign that says stop.")],
        )
        assert first[0] == f"train_images/{A}.jpg"
        drawn.add(first[1][0][1])
    assert drawn == {"A bottle of ale.", "Beer", "An ale"}


def test_empty_captions_are_skipped_and_counted(tmp_path):
    put(tmp_path, "TextCaps_0.1_val.json", published((A, ""), (B, "x"), split="val"))
    samples, skipped = split_skipped(textcaps(tmp_path, split="val"))
    assert [summarize(sample)[0] for sample in samples] == [f"train_images/{B}.jpg"]
    assert skipped == {"captions without text": 1}


@pytest.mark.parametrize("split", ["test", "val"])
def test_files_of_other_splits_are_refused(tmp_path, split):
    put(tmp_path, "x.json", published(*CAPTIONS, split=split))
    with raises_input_error(ErrorCode.INVALID_VALUE, "x.json"):
        textcaps(tmp_path, file="x.json")


def test_a_malformed_row_is_named(tmp_path):
    content = published(*CAPTIONS)
    del content["data"][1]["caption_str"]
    path = put(tmp_path, "TextCaps_0.1_train.json", content)
    with raises_input_error(ErrorCode.MISSING_VALUE, "caption_str") as caught:
        list(textcaps(tmp_path))
    assert str(caught.value).startswith(str(path))
