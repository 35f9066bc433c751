"""easy-VQA on the files of the package: samples, captions, separate splits."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from owl2.data.datasets import load_dataset
from owl2.data.datasets.easy_vqa import (
    COLORS,
    SHAPES,
    EasyVqaImage,
    EasyVqaQuestion,
    caption,
    easy_vqa,
    easy_vqa_images,
)
from owl2.data.sample import validated
from owl2.errors import ErrorCode
from owl2.processing.image_io import load_image
from owl2.processing.messages import parse_messages
from tests.errors import raises_input_error

SUFFIX = "\nAnswer the question using a single word or phrase."


def path_of(sample) -> Path:
    (path,) = parse_messages(sample.messages).images
    return Path(path)


def pairs(sample) -> list[tuple[str, str]]:
    """(user text, answer) of each round, without the image."""
    texts = [
        turn["content"] if isinstance(turn["content"], str) else turn["content"][-1]["text"]
        for turn in sample.messages
    ]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize(
    ("split", "images", "questions"), [("train", 4000, 38575), ("test", 1000, 9673)]
)
def test_single_style_keeps_the_order_of_the_package(split, images, questions):
    samples = easy_vqa(split, prompt="short")
    assert len(samples) == questions
    assert len({path_of(sample) for sample in samples}) == images
    import easy_vqa as package

    texts, answers, numbers = getattr(package, f"get_{split}_questions")()
    paths = getattr(package, f"get_{split}_image_paths")()
    for place in (0, 1, questions // 2, questions - 1):
        assert pairs(samples[place]) == [(texts[place], answers[place])]
        assert path_of(samples[place]) == Path(paths[numbers[place]])
        assert samples[place].source == f"easy_vqa/{split}#{place}"


def test_the_splits_share_no_image():
    for split in ("train", "test"):
        samples = easy_vqa(split, style="joined")
        assert {path_of(sample).parents[1].name for sample in samples} == {split}


@pytest.mark.parametrize("style", ["captions", "joined", "single"])
def test_samples_are_well_formed(style):
    samples = easy_vqa("train", style=style)
    for sample in samples[::97]:
        validated(sample)
        assert sample.messages[0]["content"][0]["type"] == "image"
        assert load_image(path_of(sample)).size == (64, 64)


def test_joined_shuffles_all_questions_of_an_image():
    joined = {path_of(sample): sample for sample in easy_vqa("test", style="joined")}
    assert len(joined) == 1000
    single: dict[Path, list] = {}
    for sample in easy_vqa("test"):
        single.setdefault(path_of(sample), []).extend(pairs(sample))
    reordered = 0
    for path, sample in joined.items():
        assert Counter(pairs(sample)) == Counter(single[path])
        reordered += pairs(sample) != single[path]
    assert reordered > 970


def test_max_rounds_splits_conversations():
    expected = {path_of(sample): sample for sample in easy_vqa("test", style="joined")}
    parts = easy_vqa("test", style="joined", max_rounds=3)
    assert {len(pairs(part)) for part in parts} == {1, 2, 3}
    regrouped = {}
    for part in parts:
        regrouped.setdefault(path_of(part), []).extend(pairs(part))
    assert regrouped == {path: pairs(sample) for path, sample in expected.items()}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"max_rounds": 0}, ErrorCode.INVALID_VALUE),
        ({"max_rounds": "3"}, ErrorCode.INVALID_TYPE),
        ({"max_rounds": 3, "style": "single"}, ErrorCode.CONFLICT),
    ],
)
def test_an_invalid_max_rounds_is_refused(options, code):
    with raises_input_error(code, "max_rounds"):
        load_dataset("easy_vqa", **{"style": "joined"} | options)


def test_joined_order_depends_on_the_seed_only():
    first, again, other = (easy_vqa("test", style="joined", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert sum(one != two for one, two in zip(first, other, strict=True)) > 970


def test_prompts():
    def first(**options) -> str:
        return pairs(easy_vqa("test", **options)[0])[0][0]

    assert first() == f"what is the red shape?{SUFFIX}"
    assert first(prompt="short") == "what is the red shape?"
    assert first(prompt="{braces} Q: {question}") == "{braces} Q: what is the red shape?"
    joined = easy_vqa("test", style="joined")[0]
    assert all(question.endswith(SUFFIX) for question, _ in pairs(joined))


@pytest.mark.parametrize(
    ("split", "options", "expected_error"),
    [
        ("validation", {}, (ErrorCode.UNKNOWN_NAME, "validation")),
        ("train", {"style": "caption"}, (ErrorCode.INVALID_VALUE, "captions")),
        ("train", {"style": ["single"]}, (ErrorCode.INVALID_VALUE,)),
        ("train", {"prompt": "what?"}, (ErrorCode.INVALID_VALUE, "short")),
        ("train", {"prompt": 3}, (ErrorCode.INVALID_TYPE, "prompt")),
        ("test", {"style": "captions"}, (ErrorCode.INVALID_VALUE,)),
    ],
)
def test_invalid_options_are_refused(split, options, expected_error):
    with raises_input_error(*expected_error):
        load_dataset("easy_vqa", split, **options)


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "owl2-vlm[data]"):
        easy_vqa("train")


# ------------------------------------------------------------------ captions


def image_with(*questions: tuple[str, str]) -> EasyVqaImage:
    rows = [EasyVqaQuestion(number, *question) for number, question in enumerate(questions)]
    return EasyVqaImage(0, "0.png", rows)


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        (
            [("what shape is present?", "circle"), ("what color is the shape?", "red")],
            "a red circle.",
        ),
        ([("what is the blue shape?", "triangle")], "a blue triangle."),
        ([("what color is the triangle?", "teal")], "a teal triangle."),
        ([("is there a circle?", "yes")], "a circle."),
        ([("is no circle present?", "no")], "a circle."),
        ([("does the image not contain a gray shape?", "no")], "a gray shape."),
        ([("is there not a circle?", "yes")], "a shape."),
        ([("is there a circle?", "no"), ("is no triangle present?", "yes")], "a rectangle."),
        (
            [(f"is there a {color} shape?", "no") for color in COLORS[1:]],
            f"a {COLORS[0]} shape.",
        ),
        ([(f"is there a {color} shape?", "no") for color in COLORS[2:]], "a shape."),
    ],
)
def test_caption_contains_what_the_answers_reveal(questions, expected):
    assert caption(image_with(*questions)) == expected


@pytest.mark.parametrize(
    "questions",
    [
        [("what shape is present?", "circle"), ("is there a triangle?", "yes")],
        [("what shape is present?", "circle"), ("is there a circle?", "no")],
        [(f"is there a {shape}?", "no") for shape in SHAPES],
    ],
)
def test_contradictions_are_refused(questions):
    with raises_input_error(ErrorCode.INVALID_FORMAT, "0.png"):
        caption(image_with(*questions))


def test_number_of_complete_captions():
    words = [caption(image)[2:-1].split() for image in easy_vqa_images("train")]
    counts = Counter((bool({*texts} & {*COLORS}), bool({*texts} & {*SHAPES})) for texts in words)
    assert counts == {
        (True, True): 3578,
        (False, True): 259,
        (True, False): 134,
        (False, False): 29,
    }


def test_captions_name_the_color_of_the_image():
    paint = {
        "black": (0, 0, 0),
        "blue": (0, 0, 255),
        "brown": (165, 42, 42),
        "gray": (128, 128, 128),
        "green": (0, 255, 0),
        "red": (255, 0, 0),
        "teal": (0, 128, 128),
        "yellow": (255, 255, 0),
    }
    compared = 0
    for image in easy_vqa_images("train")[::4]:
        color = caption(image).split()[1]
        if color in COLORS:
            counts = sorted(load_image(image.path).getcolors(64 * 64), reverse=True)
            shape_and_background = [value for _, value in counts[:2]]
            assert paint[color] in shape_and_background, image.path
            compared += 1
    assert compared > 900
