import pytest

from owl2.data.datasets.regions import format_box, region_samples
from tests.data.datasets.published_files import summarize


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((10, 20, 30, 40), (100, 200), "[0.10, 0.10, 0.40, 0.30]"),
        ((0, 0, 100, 200), (100, 200), "[0.00, 0.00, 1.00, 1.00]"),
        ((-10, 190, 60, 60), (100, 200), "[0.00, 0.95, 0.50, 1.00]"),
        ((33.333, 0, 1, 100), (100, 100), "[0.33, 0.00, 0.34, 1.00]"),
        ((10, 10, 0, 5), (100, 100), None),
        ((10, 10, 5, -5), (100, 100), None),
        ((100, 10, 5, 5), (100, 100), None),
        ((-9, 10, 5, 5), (100, 100), None),
        ((10, 10, 0.4, 50), (100, 100), None),
        ((10, 10, 5, 5), (0, 100), None),
    ],
)
def test_boxes_are_fractions_of_the_image(box, size, expected):
    assert format_box(box, size) == expected


def test_both_directions_give_separate_conversations():
    boxes = ("[0.00, 0.05, 0.50, 1.00]", "[0.25, 0.50, 0.75, 0.99]")
    regions = [("a dog", boxes[0]), ("its {box}", boxes[1])]
    described, located = region_samples("a.jpg", regions, "both", 10, "here")
    assert summarize(described) == (
        "a.jpg",
        [
            (
                "<|image|>\nDescribe the region [0.00, 0.05, 0.50, 1.00] of the image in a short "
                "phrase.",
                "a dog",
            ),
            (
                "Describe the region [0.25, 0.50, 0.75, 0.99] of the image in a short phrase.",
                "its {box}",
            ),
        ],
    )
    where = "Where in the image is"
    how = "Give the region as [left, top, right, bottom]."
    assert summarize(located) == (
        "a.jpg",
        [
            (f'<|image|>\n{where} "a dog"? {how}', "[0.00, 0.05, 0.50, 1.00]"),
            (f'{where} "its {{box}}"? {how}', "[0.25, 0.50, 0.75, 0.99]"),
        ],
    )
    assert (described.source, located.source) == ("here, describe", "here, locate")
    assert [*region_samples("a.jpg", regions, "locate", 10, "here")] == [located]
    assert [*region_samples("a.jpg", regions, "describe", 10, "here")] == [described]
