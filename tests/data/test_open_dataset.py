import json
import multiprocessing
from collections.abc import Sequence

import pytest

from owl2.data.arrow_dataset import ArrowDataset
from owl2.data.json_dataset import JsonDataset
from owl2.data.open_dataset import open_dataset, open_from_cli
from owl2.data.sample import Sample
from owl2.data.webdataset import TarDataset
from owl2.errors import ErrorCode
from tests.data.tars import captions, write_tar
from tests.errors import raises_input_error

ROW = {"image": "a.png", "caption": "a fox"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(ROW))
    return path


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a.tar", captions(range(3)))


@pytest.fixture
def table(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {split: datasets.Dataset.from_list([ROW]) for split in ("train", "dev")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "table")
    return tmp_path / "table"


def test_recipe_and_cli_open_the_same_datasets(file, shard, table, tmp_path):
    (tmp_path / "images").mkdir()
    images = str(tmp_path / "images")
    pairs: list[tuple[type, object, object]] = [
        (JsonDataset, open_dataset(file=str(file)), open_from_cli(str(file))),
        (
            JsonDataset,
            open_dataset(file=str(file), images=images),
            open_from_cli(str(file), [f"images={images}"]),
        ),
        (TarDataset, open_dataset(shards=str(shard)), open_from_cli(str(shard))),
        (
            TarDataset,
            open_dataset(shards=[f"{tmp_path}/*.tar"]),
            open_from_cli(f"{tmp_path}/*.tar"),
        ),
        (ArrowDataset, open_dataset(hf_dataset=str(table)), open_from_cli(str(table))),
        (
            ArrowDataset,
            open_dataset(hf_dataset=str(table), split="dev", images=images),
            open_from_cli(str(table), ["split=dev", f"images={images}"]),
        ),
    ]
    for kind, one, two in pairs:
        assert isinstance(one, kind)
        assert list(one) == list(two)
    assert images in repr(pairs[1][1][0]) and images in repr(pairs[5][1][0])
    assert "dev, row 1" in pairs[5][1][0].source


def test_options_reach_the_dataset_from_recipe_and_cli():
    words = ["split=train", "style=joined", "prompt=short", "seed=5"]
    options = {"prompt": "short", "seed": 5}
    one = open_dataset(dataset="easy_vqa", style="joined", options=options)
    assert len(one) == 4000
    assert one[:20] == open_from_cli("easy_vqa", words)[:20]
    assert one[:20] != open_dataset(dataset="easy_vqa", style="joined")[:20]


@pytest.mark.parametrize("origins", [{}, {"file": "a.json", "hf_dataset": "t"}])
def test_exactly_one_origin_is_required(origins):
    with raises_input_error(ErrorCode.CONFLICT):
        open_dataset(**origins)


@pytest.mark.parametrize(
    ("source", "settings", "expected_error"),
    [
        ("easy_vq", [], (ErrorCode.UNKNOWN_NAME, "easy_vqa")),
        ("easy_vqa", ["style"], (ErrorCode.INVALID_FORMAT, "option=value")),
        ("easy_vqa", ["=3"], (ErrorCode.INVALID_FORMAT, "option=value")),
        ("easy_vqa", ["stile=joined"], (ErrorCode.UNKNOWN_NAME, "style")),
        ("easy_vqa", ["name=joined"], (ErrorCode.UNKNOWN_NAME, "name")),
        ("easy_vqa", ["style=[unclosed"], (ErrorCode.INVALID_FORMAT,)),
        ("chat.json", ["split=train"], (ErrorCode.UNKNOWN_NAME,)),
        ("a.tar", ["split=train"], (ErrorCode.UNKNOWN_NAME,)),
        (".", [], (ErrorCode.INVALID_FORMAT, "json")),
    ],
)
def test_invalid_cli_settings_are_refused(source, settings, expected_error):
    with raises_input_error(*expected_error):
        open_from_cli(source, settings)


def _first(samples: Sequence[Sample] | TarDataset) -> Sample:
    return next(iter(samples))


@pytest.mark.slow  # the other process imports everything again
def test_datasets_can_be_pickled_for_spawned_processes(file, shard, table):
    """Spawned, not forked: open files are not inherited."""
    sources = [JsonDataset(file), TarDataset(str(shard)), ArrowDataset(table)]
    expected = [_first(source) for source in sources]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_first, sources) == expected
