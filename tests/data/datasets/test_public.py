"""Tests of all converters."""

import inspect

import pytest

from owl2.data.datasets.registry import DATASET_CARDS, from_package
from owl2.errors import ErrorCode
from owl2.registry import options_of
from tests.data.datasets.published_files import summarize_all
from tests.errors import raises_input_error

OF_THE_PAPER = [
    *("cc3m", "cc12m", "laion", "coyo", "datacomp"),
    *("coco_captions", "textcaps", "vqav2", "okvqa", "gqa", "ocr_vqa", "aokvqa"),
    *("refcoco", "visual_genome", "llava_instruct", "sharegpt", "slimorca"),
]


def test_all_datasets_of_the_paper_are_registered():
    assert set(DATASET_CARDS) == {*OF_THE_PAPER, "easy_vqa"}
    assert all(entry.url.startswith("https://") for entry in DATASET_CARDS.values())


@pytest.mark.parametrize("name", DATASET_CARDS)
def test_options_have_defaults_and_test_splits_are_refused(name, tmp_path):
    options = options_of(DATASET_CARDS[name].convert)
    assert inspect.Parameter.empty not in options.values()
    folder = "package" if name == "easy_vqa" else tmp_path
    if "split" in options:
        with raises_input_error(ErrorCode.INVALID_VALUE, "split=test"):
            list(DATASET_CARDS[name].convert(folder, split="test"))


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_missing_published_files_are_reported(name, tmp_path):
    is_shards = DATASET_CARDS[name].is_shards
    code = ErrorCode.EMPTY_DATASET if is_shards else ErrorCode.FILE_NOT_FOUND
    with raises_input_error(code, tmp_path):
        list(DATASET_CARDS[name].convert(tmp_path))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND):
        list(DATASET_CARDS[name].convert(tmp_path / "none"))


def test_easy_vqa_is_read_from_the_package(tmp_path):
    samples = summarize_all(from_package("package", max_rounds=2))
    assert sum(len(rounds) for _, rounds in samples) == 38575
    with raises_input_error(ErrorCode.INVALID_VALUE):
        list(from_package(tmp_path))
