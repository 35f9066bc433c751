import os
import pickle
from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode, InputError
from tests.data.datasets.published_files import put, split_skipped, summarize, summarize_all
from tests.errors import raises_input_error

refcoco = partial(read_published, "refcoco")


def thing(number: int, image: int, *phrases: str, split: str = "train") -> dict:
    return {
        "sent_ids": list(range(len(phrases))),
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "ann_id": number + 1000,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": phrase.split(), "raw": phrase.upper(), "sent_id": place, "sent": phrase}
            for place, phrase in enumerate(phrases)
        ],
        "category_id": 1,
    }


def instances(*boxes: tuple[int, int, list[float]]) -> dict:
    numbers = dict.fromkeys(image for _, image, _ in boxes)
    return {
        "info": {"description": "2014 MS COCO dataset"},
        "images": [
            {
                "license": 1,
                "file_name": f"COCO_train2014_{number:012d}.jpg",
                "coco_url": "http://mscoco.org/images/9",
                "height": 200,
                "width": 100,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm9.staticflickr.com/a.jpg",
                "id": number,
            }
            for number in numbers
        ],
        "licenses": [],
        "annotations": [
            {
                "segmentation": [[1.0, 2.0, 3.0, 4.0]],
                "area": 20.5,
                "iscrowd": 0,
                "image_id": image,
                "bbox": box,
                "category_id": 1,
                "id": number + 1000,
            }
            for number, image, box in boxes
        ],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }


BOXES = instances((1, 9, [10, 20, 30, 40]), (2, 7, [0, 0, 50, 50]), (3, 9, [50.0, 100, 50, 100]))
THINGS = [thing(1, 9, "man left", "the man"), thing(2, 7, "cup"), thing(3, 9, "dog")]


def put_things(folder, things: object, name: str = "refs(unc).p", protocol: int = 2) -> None:
    (folder / name).write_bytes(pickle.dumps(things, protocol=protocol))


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, "instances.json", BOXES)
    put_things(tmp_path, THINGS)
    return tmp_path


def pairs(items) -> list[tuple[str | None, list[str]]]:
    return [(image, [answer for _, answer in rounds]) for image, rounds in summarize_all(items)]


NINE, SEVEN = (f"train2014/COCO_train2014_00000000000{n}.jpg" for n in (9, 7))


def test_objects_of_an_image_in_both_directions(folder):
    described, located = summarize_all(refcoco(folder))[:2]
    assert [words.split("] of")[0] for words, _ in described[1]] == [
        "<|image|>\nDescribe the region [0.10, 0.10, 0.40, 0.30",
        "Describe the region [0.50, 0.50, 1.00, 1.00",
    ]
    assert described[1][1][1] == "dog"
    ((phrase, box), (_, second)) = located[1]
    assert phrase.startswith(f'<|image|>\nWhere in the image is "{described[1][0][1]}"?')
    assert (box, second) == ("[0.10, 0.10, 0.40, 0.30]", "[0.50, 0.50, 1.00, 1.00]")
    assert pairs(refcoco(folder))[2:] == [(SEVEN, ["cup"]), (SEVEN, ["[0.00, 0.00, 0.50, 0.25]"])]


def test_one_expression_per_object_by_seed(folder):
    drawn = set()
    for seed in range(20):
        first = pairs(refcoco(folder, direction="describe", seed=seed))
        assert first == pairs(refcoco(folder, direction="describe", seed=seed))
        drawn.add(first[0][1][0])
    assert drawn == {"man left", "the man"}


def test_max_rounds_limits_the_conversation(folder):
    answers = pairs(refcoco(folder, direction="locate", max_rounds=1))
    assert [image for image, _ in answers] == [NINE, NINE, SEVEN]


def test_names_of_2017(folder):
    images = {image for image, _ in pairs(refcoco(folder, coco=2017))}
    assert images == {"train2017/000000000009.jpg", "train2017/000000000007.jpg"}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_splits_are_separate(tmp_path, protocol):
    put(tmp_path, "instances.json", BOXES)
    things = [
        thing(1, 9, "a man", split="testA"),
        thing(2, 7, "tasse à café", split="val"),
        THINGS[2],
    ]
    put_things(tmp_path, things, "refs(umd).p", protocol)
    options = {"refs": "refs(umd).p", "direction": "describe"}
    assert pairs(refcoco(tmp_path, **options)) == [(NINE, ["dog"])]
    assert pairs(refcoco(tmp_path, split="val", **options)) == [(SEVEN, ["tasse à café"])]


def test_python_2_byte_strings_are_read_as_utf_8(tmp_path):
    put(tmp_path, "instances.json", BOXES)
    put_things(tmp_path, [thing(2, 7, "tasse à café")])
    path = tmp_path / "refs(unc).p"
    text = "tasse à café".encode()
    length = len(text).to_bytes(4, "little")
    # The marks of Python 3's and of Python 2's strings.
    path.write_bytes(path.read_bytes().replace(b"X" + length + text, b"T" + length + text))
    assert pairs(refcoco(tmp_path, direction="describe")) == [(SEVEN, ["tasse à café"])]


def test_empty_expressions_and_boxes_are_skipped(tmp_path):
    put(tmp_path, "instances.json", instances((1, 9, [10, 20, 30, 40]), (2, 9, [5, 5, 0, 5])))
    put_things(tmp_path, [thing(1, 9, " "), thing(2, 9, "cup"), thing(1, 9, "", "a man")])
    samples, skipped = split_skipped(refcoco(tmp_path, direction="describe"))
    assert [summarize(sample)[1][0][1] for sample in samples] == ["a man"]
    assert skipped == {
        "objects without an expression": 1,
        "regions with an empty box after rounding": 1,
    }


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-done",)


def test_a_pickle_with_code_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    put_things(folder, [THINGS[0] | {"sentences": Harmful()}])
    with raises_input_error(ErrorCode.INVALID_FORMAT, "mkdir"):
        list(refcoco(folder))
    assert not (folder / "harm-done").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(THINGS)[:50], b"\x80\x02]"])
def test_damaged_pickles(folder, content):
    (folder / "refs(unc).p").write_bytes(content)
    with raises_input_error(ErrorCode.INVALID_FORMAT, "p"):
        list(refcoco(folder))


@pytest.mark.parametrize(
    ("things", "expected_error"),
    [
        ({}, (ErrorCode.INVALID_FORMAT,)),
        ([], (ErrorCode.INVALID_FORMAT,)),
        ([THINGS[0], 3], (ErrorCode.INVALID_TYPE, "2")),
        ([thing(9, 9, "x")], (ErrorCode.INVALID_FORMAT, "instances.json")),
        ([thing(1, 8, "x")], (ErrorCode.INVALID_FORMAT, "8")),
        ([THINGS[0] | {"sentences": "x"}], (ErrorCode.INVALID_TYPE, "sentences")),
        ([THINGS[0] | {"ref_id": None}], (ErrorCode.INVALID_TYPE, "ref_id")),
    ],
)
def test_malformed_references_are_refused(folder, things, expected_error):
    put_things(folder, things)
    with raises_input_error(*expected_error):
        list(refcoco(folder))


@pytest.mark.parametrize("box", [[1, 2, 3], None, [1, 2, 3, "4"]])
def test_malformed_boxes_are_refused(folder, box):
    put(folder, "instances.json", instances((1, 9, box), (2, 7, box), (3, 9, box)))
    with pytest.raises(InputError) as caught:
        list(refcoco(folder))
    assert caught.value.code in (ErrorCode.INVALID_FORMAT, ErrorCode.INVALID_TYPE)
    assert "instances.json, annotations 1: " in str(caught.value)
