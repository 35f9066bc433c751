import json
import multiprocessing
from collections.abc import Sequence

import pytest

from owl2.data.arrow_dataset import ArrowDataset
from owl2.data.json_dataset import JsonDataset
from owl2.data.open_dataset import open_dataset, open_from_cli
from owl2.data.sample import Sample
from owl2.data.webdataset import TarDataset
from owl2.errors import InputError
from tests.data.tars import captions, write_tar

ROW = {"image": "a.png", "caption": "a fox"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "talks.jsonl"
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


def test_the_same_by_recipe_and_by_words(file, shard, table, tmp_path):
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


def test_a_dataset_with_options():
    words = ["split=train", "style=joined", "prompt=short", "seed=5"]
    options = {"prompt": "short", "seed": 5}
    one = open_dataset(dataset="easy_vqa", style="joined", options=options)
    assert len(one) == 4000
    assert one[:20] == open_from_cli("easy_vqa", words)[:20]
    assert one[:20] != open_dataset(dataset="easy_vqa", style="joined")[:20]


@pytest.mark.parametrize("given", [{}, {"file": "a.json", "hf_dataset": "t"}])
def test_one_origin(given):
    with pytest.raises(InputError, match="Give one of dataset, file, shards and table"):
        open_dataset(**given)


@pytest.mark.parametrize(
    ("source", "settings", "complaint"),
    [
        ("easy_vq", [], "'easy_vq' is no dataset. Do you mean 'easy_vqa'"),
        ("easy_vqa", ["style"], "'style' must have the form option=value"),
        ("easy_vqa", ["=3"], "must have the form option=value"),
        ("easy_vqa", ["stile=joined"], "Do you mean 'style'"),
        ("easy_vqa", ["name=joined"], "'name' is no option"),
        ("easy_vqa", ["style=[unclosed"], "the value cannot be read"),
        ("talks.json", ["split=train"], "A file has no setting split: only images can be set"),
        ("a.tar", ["split=train"], "TarDataset has no setting split: nothing can be set"),
        (".", [], "holds no samples: give a .json"),
    ],
)
def test_wrong_settings(source, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        open_from_cli(source, settings)


def _first(samples: Sequence[Sample] | TarDataset) -> Sample:
    return next(iter(samples))


@pytest.mark.slow  # the other process imports everything anew
def test_sources_travel_to_another_process(file, shard, table):
    """Started anew, not forked: what is open here is not open there."""
    sources = [JsonDataset(file), TarDataset(str(shard)), ArrowDataset(table)]
    expected = [_first(source) for source in sources]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_first, sources) == expected
