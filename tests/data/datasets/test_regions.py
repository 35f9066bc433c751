import pytest

from owl2.data.datasets.regions import (
    Region,
    check_region_options,
    format_box,
    make_region,
    region_samples,
    shuffled,
)
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import summarize
from tests.errors import raises_input_error


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((10, 20, 30, 40), (100, 200), (0.1, 0.1, 0.4, 0.3)),
        ((0, 0, 100, 200), (100, 200), (0, 0, 1, 1)),
        ((-10, 190, 60, 60), (100, 200), (0, 0.95, 0.5, 1)),
        ((33.333, 0, 1, 100), (100, 100), (0.33, 0, 0.34, 1)),
    ],
)
def test_boxes_are_fractions_of_the_image(box, size, expected):
    made = make_region("a dog", box, size)
    assert made is not None
    assert made.box == pytest.approx(expected)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((10, 10, 0, 5), (100, 100)),
        ((10, 10, 5, -5), (100, 100)),
        ((100, 10, 5, 5), (100, 100)),
        ((-9, 10, 5, 5), (100, 100)),
        ((10, 10, 0.4, 50), (100, 100)),
        ((10, 10, 5, 5), (0, 100)),
    ],
)
def test_empty_boxes_are_not_regions(box, size):
    assert make_region("a dog", box, size) is None


def test_both_directions_give_separate_conversations():
    given = [Region("a dog", (0, 0.05, 0.5, 1)), Region("its {box}", (0.25, 0.5, 0.75, 0.99))]
    described, located = region_samples("a.jpg", given, "both", "here")
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
    assert [*region_samples("a.jpg", given, "locate", "here")] == [located]
    assert [*region_samples("a.jpg", given, "describe", "here")] == [described]


def test_format_box():
    assert format_box((0, 1, 0.125, 0.999)) == "[0.00, 1.00, 0.12, 1.00]"


def test_the_order_depends_on_seed_and_image():
    given = [Region(str(number), (0, 0, 1, 1)) for number in range(20)]
    assert shuffled(given, 1, "a.jpg") == shuffled(given, 1, "a.jpg")
    assert shuffled(given, 1, "a.jpg") != shuffled(given, 2, "a.jpg")
    assert shuffled(given, 1, "a.jpg") != shuffled(given, 1, "b.jpg")
    assert sorted(shuffled(given, 1, "a.jpg"), key=given.index) == given


@pytest.mark.parametrize("max_rounds", [0, -1, True, "10", 1.5])
def test_region_options_are_checked(max_rounds):
    with raises_input_error(ErrorCode.INVALID_VALUE):
        check_region_options("both", max_rounds)
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "locate"):
        check_region_options("locat", 10)
