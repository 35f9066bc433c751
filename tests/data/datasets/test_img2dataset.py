import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from owl2.data.datasets.img2dataset import Shard, shard_patterns, shards
from owl2.data.sample import SkippedRows
from owl2.errors import ErrorCode
from tests.errors import raises_input_error


def put_shard(
    folder: Path,
    number: int,
    pairs: int = 2,
    captions: Sequence[str | None] = ("a dog",),
    **statistics: object,
) -> Path:
    """A shard as img2dataset writes it, with its statistics.

    `captions` are repeated; "" is written for a caption that is null. Without any, no caption
    column was given.
    """
    path = folder / f"{number:05d}.tar"
    with tarfile.open(path, "w") as archive:
        for place in range(pairs):
            key = f"{number:05d}{place:04d}"
            caption = captions[place % len(captions)] if captions else None
            row = {
                "url": "https://example.org/dog.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 256,
                "original_width": 640,
                "original_height": 480,
                "exif": "{}",
                "sha256": "5f",
            }
            files = {"jpg": b"\xff\xd8 image", "json": json.dumps(row).encode()}
            if captions:
                files["json"] = json.dumps(row | {"caption": caption}).encode()
                files["txt"] = (caption or "").encode()
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    summarize = {
        "count": pairs + 3,
        "successes": pairs,
        "failed_to_download": 2,
        "failed_to_resize": 1,
        "duration": 12.5,
        "start_time": 1700000000.0,
        "end_time": 1700000012.5,
        "status_dict": {"success": pairs, "HTTP Error 404: Not Found": 2},
    }
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(summarize | statistics))
    (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return path


def test_complete_shards_are_listed_in_order(tmp_path):
    paths = [put_shard(tmp_path, number, pairs) for number, pairs in ((2, 1), (0, 2), (1, 3))]
    (tmp_path / "wandb.tar").write_bytes(b"")  # not a shard's name
    expected = [Shard(paths[1], 2), Shard(paths[2], 3), Shard(paths[0], 1)]
    assert list(shards(tmp_path)) == list(shards(tmp_path, read=True)) == expected


def test_incomplete_shards_are_skipped(tmp_path):
    unfinished, cut, _, tiny, good = (put_shard(tmp_path, number) for number in range(5))
    unfinished.with_name("00000_stats.json").unlink()
    cut.write_bytes(cut.read_bytes()[:2048])
    put_shard(tmp_path, 2, pairs=0)
    tiny.write_bytes(b"")
    assert list(shards(tmp_path)) == [
        SkippedRows("shards without statistics"),
        SkippedRows("truncated shards"),
        SkippedRows("shards without a pair"),
        SkippedRows("truncated shards"),
        Shard(good, 2),
    ]


def test_read_compares_images_with_statistics(tmp_path):
    path = put_shard(tmp_path, 0, successes=3)
    assert list(shards(tmp_path)) == [Shard(path, 3)]
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "00000.tar"):
        list(shards(tmp_path, read=True))
    path.write_bytes(b"garbage" * 512 + bytes(1024))
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "00000.tar"):
        list(shards(tmp_path, read=True))


def test_images_without_a_caption_are_no_pairs(tmp_path):
    put_shard(tmp_path, 0, captions=())
    put_shard(tmp_path, 1, captions=(None, "", " \n"))
    some = put_shard(tmp_path, 2, pairs=4, captions=(None, "a dog", ""))
    assert list(shards(tmp_path, read=True)) == [
        SkippedRows("images without a caption", 2),
        SkippedRows("shards without captions"),
        SkippedRows("images without a caption", 2),
        SkippedRows("shards without captions"),
        SkippedRows("images without a caption", 3),
        Shard(some, 1),
    ]
    none = [SkippedRows("images without a caption", 2), SkippedRows("shards without captions")]
    assert list(shards(tmp_path)) == [*none, *none, Shard(some, 4)]


@pytest.mark.parametrize("name", ["files", "parquet", "tfrecord"])
def test_other_formats_of_img2dataset_are_explained(tmp_path, name):
    (tmp_path / "00000_stats.json").write_text("{}")
    if name == "files":
        (tmp_path / "00000").mkdir()
    (tmp_path / ("00000.tfrecord" if name == "tfrecord" else "00000.parquet")).write_bytes(b"")
    with raises_input_error(ErrorCode.EMPTY_DATASET, f"'{name}'"):
        list(shards(tmp_path))


def test_invalid_directories_and_statistics_are_refused(tmp_path):
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        list(shards(tmp_path))
    path = put_shard(tmp_path, 0, successes="2")
    with raises_input_error(ErrorCode.INVALID_TYPE, "00000_stats.json"):
        list(shards(tmp_path))
    path.with_name("00000_stats.json").write_text("{")
    with raises_input_error(ErrorCode.INVALID_FORMAT, "00000_stats.json"):
        list(shards(tmp_path))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (["00000"], ["d/00000.tar"]),
        (["00000", "00001", "00002"], ["d/{00000..00002}.tar"]),
        (
            ["00000", "00001", "00003", "00005", "00006"],
            ["d/{00000..00001}.tar", "d/00003.tar", "d/{00005..00006}.tar"],
        ),
        (["99999", "100000"], ["d/99999.tar", "d/100000.tar"]),
        ([], []),
    ],
)
def test_shard_patterns(numbers, expected):
    assert shard_patterns([Path("d") / f"{number}.tar" for number in numbers]) == expected
