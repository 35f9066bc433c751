from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import put, split_skipped, summarize
from tests.errors import raises_input_error

visual_genome = partial(read_published, "visual_genome")


def phrase(number: int, words: str, box=(10, 20, 30, 40), image: int = 1) -> dict:
    x, y, width, height = box
    return {
        "region_id": number,
        "width": width,
        "height": height,
        "image_id": image,
        "phrase": words,
        "y": y,
        "x": x,
    }


def image(number: int, folder: str = "VG_100K_2") -> dict:
    return {
        "width": 100,
        "url": f"https://cs.stanford.edu/people/rak248/{folder}/{number}.jpg",
        "height": 200,
        "image_id": number,
        "coco_id": None,
        "flickr_id": None,
    }


def publish(folder, *rows: dict) -> None:
    put(folder, "region_descriptions.json", list(rows))
    put(folder, "image_data.json", [image(1), image(2, "VG_100K")])


def test_regions_both_ways(tmp_path):
    publish(
        tmp_path,
        {"regions": [phrase(5, "a man "), phrase(6, "a shoe", (0, 0, 100, 100))], "id": 1},
        {"id": 2, "regions": [phrase(7, "a car", image=2)]},
    )
    samples, skipped = split_skipped(visual_genome(tmp_path))
    assert skipped == {}
    images = [summarize(sample)[0] for sample in samples]
    assert images == ["VG_100K_2/1.jpg", "VG_100K_2/1.jpg", "VG_100K/2.jpg", "VG_100K/2.jpg"]
    described = dict(summarize(samples[0])[1])
    assert sorted(described.values()) == ["a man", "a shoe"]
    (first,) = (words for words, answer in summarize(samples[0])[1] if answer == "a man")
    assert "[0.10, 0.10, 0.40, 0.30]" in first
    assert summarize(samples[3])[1] == [
        (
            '<|image|>\nWhere in the image is "a car"? '
            "Give the region as [left, top, right, bottom].",
            "[0.10, 0.10, 0.40, 0.30]",
        )
    ]


def test_max_rounds_regions_are_selected_by_seed(tmp_path):
    publish(tmp_path, {"id": 1, "regions": [phrase(n, f"thing {n}") for n in range(25)]})
    drawn = set()
    for seed in range(5):
        (sample,), skipped = split_skipped(visual_genome(tmp_path, direction="describe", seed=seed))
        assert skipped == {"regions beyond 10 per image": 15}
        answers = tuple(answer for _, answer in summarize(sample)[1])
        assert len(set(answers)) == 10
        drawn.add(answers)
    assert len(drawn) == 5
    again, _ = split_skipped(visual_genome(tmp_path, direction="describe", seed=4))
    assert again == [sample]


def test_empty_phrases_and_boxes_are_skipped(tmp_path):
    rows = [phrase(1, " "), phrase(2, "x", (10, 10, 0, 5)), phrase(3, "y", (200, 10, 5, 5))]
    publish(tmp_path, {"id": 1, "regions": rows}, {"id": 2, "regions": []})
    samples, skipped = split_skipped(visual_genome(tmp_path))
    assert samples == []
    assert skipped == {
        "regions without a phrase": 1,
        "regions with an empty box after rounding": 2,
        "images without a usable region": 2,
    }


@pytest.mark.parametrize(
    ("row", "expected_error"),
    [
        ({"id": 3, "regions": []}, (ErrorCode.INVALID_FORMAT, "2")),
        ({"regions": []}, (ErrorCode.MISSING_VALUE, "id")),
        ({"id": 1, "regions": [{"phrase": "x"}]}, (ErrorCode.MISSING_VALUE, "2")),
        ({"id": 1, "regions": [phrase(1, "x") | {"y": "3"}]}, (ErrorCode.INVALID_TYPE, "y")),
    ],
)
def test_malformed_rows_are_refused(tmp_path, row, expected_error):
    publish(tmp_path, {"id": 2, "regions": []}, row)
    with raises_input_error(*expected_error) as caught:
        list(visual_genome(tmp_path))
    assert str(caught.value).startswith(str(tmp_path / "region_descriptions.json"))


def test_a_url_without_a_directory_is_refused(tmp_path):
    publish(tmp_path, {"id": 1, "regions": []})
    put(tmp_path, "image_data.json", [image(1) | {"url": "1.jpg"}])
    with raises_input_error(ErrorCode.INVALID_FORMAT, "url"):
        list(visual_genome(tmp_path))
