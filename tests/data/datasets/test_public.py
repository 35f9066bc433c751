"""Tests of all converters, and of the datasets that training reads directly."""

from pathlib import Path

import pytest

from owl2.data.datasets import DATASETS, load_dataset
from owl2.data.datasets.registry import DATASET_CARDS, read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import summarize_all
from tests.errors import raises_input_error

OF_THE_PAPER = [
    *("cc3m", "cc12m", "laion", "coyo", "datacomp"),
    *("coco_captions", "textcaps", "vqav2", "okvqa", "gqa", "ocr_vqa", "aokvqa"),
    *("refcoco", "visual_genome", "llava_instruct", "sharegpt", "slimorca"),
]


def test_all_datasets_of_the_paper_are_registered():
    assert set(DATASET_CARDS) == {*OF_THE_PAPER, "easy_vqa", "opinion_scores"}
    assert all(card.url.startswith("https://") for card in DATASET_CARDS.values())


@pytest.mark.parametrize("name", [name for name, card in DATASET_CARDS.items() if card.splits])
@pytest.mark.parametrize("split", ["test", "testA", "test2015", "TEST"])
def test_test_splits_are_refused(name, split, tmp_path):
    with raises_input_error(ErrorCode.INVALID_VALUE, f"split={split}"):
        read_published(name, tmp_path, split=split)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_missing_published_files_are_reported(name, tmp_path):
    is_shards = DATASET_CARDS[name].is_shards
    code = ErrorCode.EMPTY_DATASET if is_shards else ErrorCode.FILE_NOT_FOUND
    with raises_input_error(code, tmp_path):
        list(read_published(name, tmp_path))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "none"):
        list(read_published(name, tmp_path / "none"))


@pytest.mark.parametrize(
    ("name", "options", "expected_error"),
    [
        ("vqav2", {"split": "vall"}, (ErrorCode.UNKNOWN_NAME, "vqav2")),
        ("vqav2", {"coco": 2015}, (ErrorCode.INVALID_VALUE, "coco=2015")),
        ("vqav2", {"seed": 1}, (ErrorCode.UNKNOWN_NAME, "seed")),
        ("gqa", {"max_rounds": 0}, (ErrorCode.INVALID_VALUE, "max_rounds=0")),
        ("gqa", {"max_rounds": "10"}, (ErrorCode.INVALID_TYPE, "max_rounds=10")),
        ("refcoco", {"max_rounds": True}, (ErrorCode.INVALID_TYPE, "max_rounds=True")),
        ("visual_genome", {"direction": "locat"}, (ErrorCode.INVALID_VALUE, "locate")),
        ("sharegpt", {"split": "train"}, (ErrorCode.UNKNOWN_NAME, "split")),
    ],
)
def test_invalid_options_are_refused(tmp_path, name, options, expected_error):
    with raises_input_error(*expected_error):
        read_published(name, tmp_path, **options)


def test_easy_vqa_is_read_from_the_package(tmp_path):
    samples = summarize_all(read_published("easy_vqa", Path("package"), max_rounds=2))
    assert sum(len(rounds) for _, rounds in samples) == 38575
    with raises_input_error(ErrorCode.INVALID_VALUE):
        list(read_published("easy_vqa", tmp_path))


def test_options_reach_the_dataset(monkeypatch):
    def colors(split: str, *, bright: bool = False) -> list[str]:
        return [f"{split} {bright}"]

    monkeypatch.setitem(DATASETS, "colors", colors)
    assert load_dataset("colors") == ["train False"]
    assert load_dataset("colors", "test", bright=True) == ["test True"]
    for option in ("brigth", "split", "name"):
        with raises_input_error(ErrorCode.UNKNOWN_NAME, option):
            load_dataset("colors", "train", **{option: True})
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "easy-vqa"):
        load_dataset("easy-vqa")
