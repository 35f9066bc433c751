import json
from itertools import islice, pairwise
from random import Random

import pytest

from owl2.data.row_parsers import parse_row
from owl2.data.sample import InvalidSample, Sample
from owl2.data.webdataset import TarDataset, is_shard_url
from owl2.errors import ErrorCode
from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import parse_messages
from tests.data.tars import PNG, captions, image, write_shards, write_tar
from tests.errors import raises_input_error


def number(sample: Sample | InvalidSample) -> int:
    assert isinstance(sample, Sample)
    return int(sample.messages[1]["content"])


def numbers(stream, count: int) -> list[int]:
    return [number(sample) for sample, _ in islice(stream, count)]


def text(sample: Sample) -> list[str]:
    return [content_to_text(turn["content"]) for turn in parse_messages(sample.messages).turns]


def one(tmp_path, *files) -> Sample | InvalidSample:
    (sample,) = TarDataset(str(write_tar(tmp_path / "one.tar", files)))
    return sample


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TarDataset:
    """40 samples in 5 shards of unequal size; one of them is empty."""
    return TarDataset(
        str(write_shards(tmp_path_factory.mktemp("shards"), [11, 3, 0, 17, 9]) / "*.tar")
    )


# ------------------------------------------------------------------ order


def test_iteration_returns_all_samples_in_order(shards):
    samples = list(shards)
    assert [number(sample) for sample in samples] == list(range(40))
    assert samples[11].source == f"{shards.urls[1]}, 000011"


@pytest.mark.parametrize("shuffle_buffer", [1, 7, 10, 40, 1000])
def test_an_epoch_has_every_sample_once(shards, shuffle_buffer):
    drawn = numbers(shards.stream(seed=0, shuffle_buffer=shuffle_buffer), 120)
    epochs = [drawn[:40], drawn[40:80], drawn[80:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_stream_order_depends_on_the_seed_only(shards):
    first, again = (numbers(shards.stream(seed=3, shuffle_buffer=8), 90) for _ in range(2))
    assert first == again
    assert first != numbers(shards.stream(seed=4, shuffle_buffer=8), 90)


def test_a_buffer_of_one_keeps_the_order_of_each_shard(shards):
    drawn = numbers(shards.stream(seed=0, shuffle_buffer=1), 40)
    expected = [list(range(*ends)) for ends in [(0, 11), (11, 14), (14, 31), (31, 40)]]
    starts = sorted((drawn.index(shard[0]), shard) for shard in expected)
    assert drawn == [place for _, shard in starts for place in shard]


def test_each_buffer_is_shuffled_differently(tmp_path):
    shards = TarDataset(str(write_tar(tmp_path / "a.tar", captions(range(40)))))
    drawn = numbers(shards.stream(seed=0, shuffle_buffer=10), 40)
    orders = [tuple(place % 10 for place in drawn[at : at + 10]) for at in range(0, 40, 10)]
    assert [sorted(drawn[at : at + 10]) for at in range(0, 40, 10)] == [
        list(range(at, at + 10)) for at in range(0, 40, 10)
    ]
    assert len(set(orders)) == 4


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("world_size", [2, 3, 5, 7, 12])
def test_processes_share_every_epoch(shards, world_size):
    """With more shards than ranks, as many, and fewer: every sample exactly once."""
    seen: list[tuple[int, int]] = []
    for rank in range(world_size):
        stream = shards.stream(seed=1, shuffle_buffer=6, rank=rank, world_size=world_size)
        for sample, state in stream:
            if state["epoch"] >= 4:  # a rank whose shards are empty passes over an epoch
                break
            seen.append((state["epoch"], number(sample)))
    assert sorted(seen) == [(epoch, place) for epoch in range(4) for place in range(40)]


def test_surplus_shards_go_to_the_ranks_in_turn(tmp_path):
    shards = TarDataset(str(write_shards(tmp_path, [4] * 3) / "*.tar"))
    streams = (
        shards.stream(seed=0, shuffle_buffer=2, rank=rank, world_size=2) for rank in range(2)
    )
    # In two epochs of three shards each of two ranks has three.
    ends = [[state["epoch"] for _, state in islice(stream, 13)] for stream in streams]
    assert [epochs.count(0) + epochs.count(1) for epochs in ends] == [12, 12]
    one = TarDataset(str(tmp_path / "000.tar"))
    # In eight epochs of one shard of four each of eight ranks has four samples.
    streams = (one.stream(seed=0, shuffle_buffer=2, rank=rank, world_size=8) for rank in range(8))
    ends = [[state["epoch"] for _, state in islice(stream, 5)] for stream in streams]
    assert [sum(epoch < 8 for epoch in epochs) for epochs in ends] == [4] * 8


# ------------------------------------------------------------------ going on


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (0, 5), (5, 7)])
@pytest.mark.parametrize("shuffle_buffer", [1, 4, 13, 100])
def test_resuming_at_any_sample_equals_uninterrupted(shards, rank, world_size, shuffle_buffer):
    settings = {"seed": 2, "shuffle_buffer": shuffle_buffer} | {
        "rank": rank,
        "world_size": world_size,
    }
    expected = list(islice(shards.stream(**settings), 100))
    for after in Random(shuffle_buffer).sample(range(1, 90), 25):
        state = json.loads(json.dumps(expected[after - 1][1]))
        resumed = list(islice(shards.stream(**settings, state=state), 10))
        assert resumed == expected[after : after + 10]


def test_resuming_opens_no_earlier_shard(tmp_path):
    directory = write_shards(tmp_path, [10] * 5)
    shards = TarDataset(str(directory / "*.tar"))
    expected = list(islice(shards.stream(seed=0, shuffle_buffer=4), 50))
    # All of the fourth and fifth shard; windows of four do not fit tens.
    _, state = expected[35]
    for url in {sample.source.split(",")[0] for sample, _ in expected[:28]}:
        open(url, "w").close()
    rest = list(islice(shards.stream(seed=0, shuffle_buffer=4, state=state), 8))
    assert rest == expected[36:44]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"shuffle_buffer": 5}, {"rank": 1}, {"world_size": 3}]
)
def test_a_state_of_other_arguments_is_refused(shards, change):
    settings = {"seed": 0, "shuffle_buffer": 4, "rank": 0, "world_size": 2}
    _, state = next(shards.stream(**settings))
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "0"):
        shards.stream(**settings | change, state=state)


def test_a_state_of_other_shards_is_refused(shards, tmp_path):
    _, state = next(shards.stream(seed=0, shuffle_buffer=4))
    other = TarDataset(str(write_shards(tmp_path, [3]) / "*.tar"))
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "5"):
        other.stream(seed=0, shuffle_buffer=4, state=state)


@pytest.mark.parametrize("world_size", [1, 3])
def test_shards_without_samples_are_refused(tmp_path, world_size):
    shards = TarDataset(str(write_shards(tmp_path, [0, 0]) / "*.tar"))
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        next(shards.stream(seed=0, shuffle_buffer=4, world_size=world_size))


def test_the_next_buffer_is_read_ahead(tmp_path, monkeypatch):
    """One sample is read for each sample that is returned."""
    shards = TarDataset(str(write_tar(tmp_path / "a.tar", captions(range(30)))))
    read: list[str] = []

    def reading(row: object, source: str, *arguments: object) -> Sample:
        read.append(source)
        return parse_row(row, source, *arguments)

    monkeypatch.setattr("owl2.data.webdataset.parse_row", reading)
    counts = [len(read) for _ in islice(shards.stream(seed=0, shuffle_buffer=10), 25)]
    assert counts[:12] == [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
    assert max(later - earlier for earlier, later in pairwise(counts)) == 1


# ------------------------------------------------------------------ samples


def row(**keys) -> tuple[str, bytes]:
    return "a.json", json.dumps(keys).encode()


def talk(*values: str) -> list[dict]:
    return [
        {"from": "gpt" if place % 2 else "human", "value": value}
        for place, value in enumerate(values)
    ]


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_a_caption_becomes_the_answer(tmp_path, ending):
    sample = one(tmp_path, (f"d/a.{ending}", PNG), ("d/a.txt", b" a fox \n"))
    assert text(sample) == ["<|image|>", "a fox"]
    assert sample.messages[0]["content"] == [{"type": "image", "image": PNG}]
    assert sample.source == f"{tmp_path / 'one.tar'}, d/a"


def test_txt_takes_precedence_over_json(tmp_path):
    sample = one(tmp_path, ("a.jpg", PNG), row(caption="not this"), ("a.txt", b"this"))
    assert text(sample) == ["<|image|>", "this"]


def test_json_may_contain_the_caption(tmp_path):
    keys = {"caption": "a fox", "url": "http://u", "key": "a", "status": "success", "exif": "{}"}
    assert text(one(tmp_path, ("a.jpg", PNG), row(**keys))) == ["<|image|>", "a fox"]


def test_json_may_contain_a_conversation(tmp_path):
    turns = talk("what?\n<image>", "a fox")
    sample = one(tmp_path, row(image="deep/b.jpg", conversations=turns), ("a.jpg", PNG))
    assert text(sample) == ["<|image|>\nwhat?", "a fox"]
    assert parse_messages(sample.messages).images == (PNG,)


def test_several_images_are_ordered_by_number(tmp_path):
    turns = [
        {"role": "user", "content": [{"type": "image"}] * 3},
        {"role": "assistant", "content": "a fox"},
    ]
    colors = [image(color) for color in ("red", "green", "blue")]
    sample = one(
        tmp_path,
        ("a.10.jpg", colors[2]),
        row(messages=turns),
        ("a.1.png", colors[1]),
        ("a.0.webp", colors[0]),
        ("a.cls", b"5"),
        ("a.seg.png", PNG),
    )
    assert list(parse_messages(sample.messages).images) == colors


def test_json_without_an_image_is_a_text_conversation(tmp_path):
    assert text(one(tmp_path, row(conversations=talk("hi", "hello")))) == ["hi", "hello"]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([("a.jpg", PNG)], ErrorCode.INVALID_FORMAT),
        ([("a.npy", b"x")], ErrorCode.INVALID_FORMAT),
        ([("a.txt", b"a fox")], ErrorCode.IMAGE_COUNT_MISMATCH),
        ([("a.0.jpg", PNG), ("a.1.jpg", PNG), ("a.txt", b"a fox")], ErrorCode.IMAGE_COUNT_MISMATCH),
        ([("a.jpg", PNG), ("a.txt", b" ")], ErrorCode.EMPTY_MESSAGE),
        ([("a.jpg", PNG), ("a.txt", b"\xff")], ErrorCode.INVALID_FORMAT),
        ([("a.jpg", PNG), ("a.json", b"{")], ErrorCode.INVALID_FORMAT),
        ([("a.jpg", PNG), ("a.json", b"[" * 100_000)], ErrorCode.INVALID_FORMAT),
        ([("a.jpg", PNG), ("a.json", b"[]")], ErrorCode.INVALID_FORMAT),
        ([("a.jpg", PNG), row(url="u", caption=None)], ErrorCode.INVALID_FORMAT),
        ([("a.jpg", PNG), row(url="u", status="success", sha256="5f")], ErrorCode.EMPTY_MESSAGE),
        ([("a.jpg", PNG), ("a.jpg", PNG), ("a.txt", b"a fox")], ErrorCode.CONFLICT),
        ([("a.jpg", PNG), row(conversations=talk("no mark", "a"))], ErrorCode.IMAGE_COUNT_MISMATCH),
        ([("a.jpg", PNG), row(conversations=talk("<image>"))], ErrorCode.INVALID_ROLE),
        ([row(image="b.jpg", conversations=talk("<image>", "a"))], ErrorCode.MISSING_IMAGE),
        (
            [
                row(
                    messages=[
                        {"role": "user", "content": [{"type": "image", "path": "b.jpg"}]},
                        {"role": "assistant", "content": "a"},
                    ]
                )
            ],
            ErrorCode.MISSING_IMAGE,
        ),
    ],
)
def test_an_invalid_sample_is_returned_in_place(tmp_path, files, code):
    good = captions([1])
    path = write_tar(tmp_path / "some.tar", [*files, *good])
    invalid, sample = TarDataset(str(path))
    assert isinstance(invalid, InvalidSample)
    assert invalid.code is code
    assert invalid.source == f"{path}, a"
    assert not invalid.reason.startswith(str(path))
    assert number(sample) == 1
    assert any(
        isinstance(drawn, InvalidSample)
        for drawn, _ in islice(TarDataset([str(path)]).stream(seed=0, shuffle_buffer=2), 2)
    )


# ------------------------------------------------------------------ names of shards


def test_patterns_are_expanded(tmp_path):
    write_shards(tmp_path, [1] * 12)
    (tmp_path / "000.txt").write_text("no shard")
    (tmp_path / "d.tar").mkdir()

    def found(*patterns: str) -> list[str]:
        urls = TarDataset([str(tmp_path / pattern) for pattern in patterns]).urls
        return [url.removeprefix(f"{tmp_path}/") for url in urls]

    assert found("*.tar") == [f"{place:03}.tar" for place in range(12)]
    assert found("{000..002}.tar") == ["000.tar", "001.tar", "002.tar"]
    assert found("01?.tar", "000.tar") == ["010.tar", "011.tar", "000.tar"]
    assert found("{00*,011}.tar") == [f"{place:03}.tar" for place in range(10)] + ["011.tar"]


def test_urls_are_not_checked_on_disk():
    urls = ["https://example.org/{00..01}.tar", "pipe:cat *.tar", "s3://bucket/{a,b}.tar"]
    assert TarDataset(urls).urls == [
        "https://example.org/00.tar",
        "https://example.org/01.tar",
        "pipe:cat *.tar",
        "s3://bucket/a.tar",
        "s3://bucket/b.tar",
    ]


@pytest.mark.parametrize(
    ("pattern", "expected_error"),
    [
        ("none-*.tar", (ErrorCode.FILE_NOT_FOUND, "none-")),
        ("{000..002}.tar", (ErrorCode.FILE_NOT_FOUND, "002.tar")),
        ("{000..002.tar", (ErrorCode.INVALID_VALUE,)),
    ],
)
def test_missing_shards_are_refused(tmp_path, pattern, expected_error):
    write_shards(tmp_path, [1, 1])
    with raises_input_error(*expected_error):
        TarDataset(str(tmp_path / pattern))
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        TarDataset([])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/{000..099}.tar", True),
        ("a/*.TAR", True),
        ("a.tar.gz", True),
        ("pipe:cat a", True),
        ("https://example.org/a", True),
        ("easy_vqa", False),
        ("pipeline/rows", False),
        ("a.jsonl", False),
        ("some/table", False),
    ],
)
def test_is_shard_url(name, expected):
    assert is_shard_url(name) == expected
