from functools import partial

import pytest

from owl2.data.datasets.coco import coco_directory, coco_image
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

coco_captions = partial(read_published, "coco_captions")
NINE, SEVEN = "COCO_train2014_000000000009.jpg", "COCO_train2014_000000000007.jpg"


def image(number: int, name: str) -> dict:
    return {
        "license": 5,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/train2014/{name}",
        "height": 480,
        "width": 640,
        "date_captured": "2013-11-14 16:28:13",
        "flickr_url": "http://farm4.staticflickr.com/a.jpg",
        "id": number,
    }


def official(*captions: tuple[int, str]) -> dict:
    return {
        "info": {"description": "This is 1.0 version of the 2014 MS COCO dataset.", "year": 2014},
        "images": [image(9, NINE), image(7, SEVEN)],
        "licenses": [{"url": "http://creativecommons.org", "id": 5, "name": "Attribution"}],
        "type": "captions",
        "annotations": [
            {"image_id": number, "id": 100 + place, "caption": caption}
            for place, (number, caption) in enumerate(captions)
        ],
    }


CAPTIONS = [(7, "A dog. \n"), (9, "Two cats"), (7, "a brown dog"), (9, "cats"), (7, "One dog")]


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, "captions_train2014.json", official(*CAPTIONS))
    return tmp_path


def test_pairs_style_returns_all_captions(folder):
    assert summarize_all(coco_captions(folder, style="pairs")) == [
        (f"train2014/{SEVEN}", [("<|image|>", "A dog.")]),
        (f"train2014/{SEVEN}", [("<|image|>", "a brown dog")]),
        (f"train2014/{SEVEN}", [("<|image|>", "One dog")]),
        (f"train2014/{NINE}", [("<|image|>", "Two cats")]),
        (f"train2014/{NINE}", [("<|image|>", "cats")]),
    ]


def test_instruction_style_selects_one_caption_by_seed(folder):
    drawn = set()
    for seed in range(20):
        (first, second) = summarize_all(coco_captions(folder, seed=seed))
        assert (first, second) == tuple(summarize_all(coco_captions(folder, seed=seed)))
        assert [first[0], second[0]] == [f"train2014/{SEVEN}", f"train2014/{NINE}"]
        ((words, caption),) = first[1]
        assert words == f"<|image|>\n{CAPTION}"
        drawn.add(caption)
    assert drawn == {"A dog.", "a brown dog", "One dog"}


def test_empty_captions_are_skipped_and_counted(tmp_path):
    put(tmp_path, "captions_train2014.json", official((7, " "), (7, "a dog"), (9, "")))
    samples, skipped = split_skipped(coco_captions(tmp_path))
    assert [summarize(sample)[1][0][1] for sample in samples] == ["a dog"]
    assert skipped == {"captions without text": 2}


def karpathy(split: str, number: int, *captions: str) -> dict:
    folder = "train2014" if split == "train" else "val2014"
    return {
        "filepath": folder,
        "sentids": [770337 + place for place in range(len(captions))],
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "imgid": 0,
        "split": split,
        "sentences": [
            {"tokens": caption.split(), "raw": caption, "imgid": 0, "sentid": 770337 + place}
            for place, caption in enumerate(captions)
        ],
        "cocoid": number,
    }


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ("train2014/COCO_train2014_000000000001.jpg", "one")),
        ("restval", ("val2014/COCO_val2014_000000000002.jpg", "two")),
        ("val", ("val2014/COCO_val2014_000000000003.jpg", "three")),
    ],
)
def test_karpathys_splits(tmp_path, split, expected):
    rows = [
        karpathy(*row)
        for row in (
            ("train", 1, "one"),
            ("restval", 2, "two"),
            ("val", 3, "three"),
            ("test", 4, "four"),
        )
    ]
    put(tmp_path, "dataset_coco.json", {"images": rows, "dataset": "coco"})
    ((name, ((_, caption),)),) = summarize_all(coco_captions(tmp_path, split=split))
    assert (name, caption) == expected


def test_a_missing_split_is_refused(tmp_path, folder):
    with raises_input_error(ErrorCode.UNKNOWN_NAME):
        list(coco_captions(folder, split="restval", file="captions_train2014.json"))
    path = put(tmp_path, "dataset_coco.json", {"images": [karpathy("val", 3, "x")]})
    with raises_input_error(ErrorCode.EMPTY_DATASET, "train"):
        list(coco_captions(tmp_path, file=str(path)))


@pytest.mark.parametrize(
    ("change", "expected_error"),
    [
        (
            {"annotations": [{"image_id": 5, "id": 1, "caption": "x"}]},
            (ErrorCode.INVALID_FORMAT, "1"),
        ),
        ({"annotations": [{"image_id": 7, "id": 1}]}, (ErrorCode.MISSING_VALUE, "caption")),
        ({"images": [{"id": 7}]}, (ErrorCode.MISSING_VALUE, "file_name")),
        ({"images": 3}, (ErrorCode.INVALID_TYPE, "images")),
    ],
)
def test_malformed_files_are_refused(tmp_path, change, expected_error):
    path = put(tmp_path, "captions_train2014.json", official(*CAPTIONS) | change)
    with raises_input_error(*expected_error) as caught:
        list(coco_captions(tmp_path))
    assert str(caught.value).startswith(str(path))


def test_a_file_of_another_split_is_refused(folder):
    with raises_input_error(ErrorCode.INVALID_VALUE, "train2014"):
        list(coco_captions(folder, split="val", file="captions_train2014.json"))


def test_file_names_of_2017(tmp_path):
    content = official((9, "Two cats"))
    content["images"] = [image(9, "000000000009.jpg")]
    put(tmp_path, "captions_train2017.json", content)
    ((name, _),) = summarize_all(coco_captions(tmp_path, split="train2017"))
    assert name == "train2017/000000000009.jpg"


def test_names_of_images():
    assert coco_image(9, "train2014") == f"train2014/{NINE}"
    assert coco_image(9, "train2017") == "train2017/000000000009.jpg"
    assert (coco_directory("val", 2014), coco_directory("train", 2017)) == ("val2014", "train2017")
    with raises_input_error(ErrorCode.UNSUPPORTED):
        coco_directory("val", 2017)
