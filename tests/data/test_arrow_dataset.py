import pytest
import torch.utils.data

from owl2.data.arrow_dataset import ArrowDataset, is_arrow_directory
from owl2.errors import ErrorCode
from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import parse_messages
from tests.data.tars import PNG
from tests.errors import raises_input_error

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

IMAGE = {"type": "image"}


def saved(path, rows: list[dict], **features):
    known = datasets.Dataset.from_list(rows)
    for column, feature in features.items():
        known = known.cast_column(column, feature)
    known.save_to_disk(path)
    return path


def messages(*parts: dict) -> list[dict]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]}
    return [{"role": "user", "content": list(parts)}, answer]


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def text(sample) -> list[str]:
    return [content_to_text(turn["content"]) for turn in parse_messages(sample.messages).turns]


def images(sample) -> tuple:
    return parse_messages(sample.messages).images


# ------------------------------------------------------------------ columns


def test_messages_with_images(tmp_path):
    rows = [
        {
            "messages": messages(IMAGE, words("or"), IMAGE),
            "images": [{"bytes": PNG}, {"bytes": b"2"}],
        },
        {"messages": messages(words("hi")), "images": []},
    ]
    path = saved(tmp_path / "t", rows, images=datasets.List(datasets.Image()))
    one, two = ArrowDataset(path)
    assert text(one) == ["<|image|>or<|image|>", "a fox"]
    assert images(one) == (PNG, b"2")  # not decoded: the second is no image
    assert text(two) == ["hi", "a fox"]
    assert two.source == f"{path}, row 2"


def test_messages_that_contain_their_images(tmp_path):
    rows = [{"messages": messages({"type": "image", "image": {"bytes": PNG, "path": None}})}]
    (sample,) = ArrowDataset(saved(tmp_path / "t", rows))
    assert images(sample) == (PNG,)


def test_llava_rows(tmp_path):
    turns = [{"from": "human", "value": "what?<image>"}, {"from": "gpt", "value": "a fox"}]
    path = saved(tmp_path / "t", [{"conversations": turns, "image": "d/a.png", "id": 1}])
    (sample,) = ArrowDataset(path)
    assert text(sample) == ["<|image|>\nwhat?", "a fox"]
    assert [str(name) for name in images(sample)] == [str(path / "d" / "a.png")]
    (sample,) = ArrowDataset(path, images=tmp_path)
    assert [str(name) for name in images(sample)] == [str(tmp_path / "d" / "a.png")]


@pytest.mark.parametrize("column", ["caption", "text"])
def test_caption_columns(tmp_path, column):
    rows = [{"image": {"bytes": PNG}, column: " a fox "}]
    (sample,) = ArrowDataset(saved(tmp_path / "t", rows, image=datasets.Image()))
    assert (text(sample), images(sample)) == (["<|image|>", "a fox"], (PNG,))


def test_an_image_column_may_contain_paths(tmp_path):
    rows = [{"image": {"bytes": None, "path": "/data/a.png"}, "caption": "a fox"}]
    (sample,) = ArrowDataset(
        saved(tmp_path / "t", rows)
    )  # with the feature, saving takes the file along
    assert [str(name) for name in images(sample)] == ["/data/a.png"]


@pytest.mark.parametrize(
    ("row", "expected_error"),
    [
        ({"image": {"bytes": None, "path": None}, "caption": "a"}, (ErrorCode.INVALID_TYPE, "1")),
        ({"image": None, "caption": "a"}, (ErrorCode.IMAGE_COUNT_MISMATCH, "1")),
        ({"image": {"bytes": PNG, "path": ""}, "caption": None}, (ErrorCode.INVALID_FORMAT, "1")),
        ({"messages": messages(IMAGE), "images": []}, (ErrorCode.IMAGE_COUNT_MISMATCH, "1")),
    ],
)
def test_invalid_rows_are_refused(tmp_path, row, expected_error):
    path = saved(tmp_path / "t", [row])
    with raises_input_error(*expected_error):
        ArrowDataset(path)[0]


@pytest.mark.parametrize("row", [{"prompt": "a", "image": "a.png"}, {"id": 1, "title": "a"}])
def test_other_columns_are_refused_when_the_dataset_is_opened(tmp_path, row):
    path = saved(tmp_path / "t", [row])
    with raises_input_error(ErrorCode.INVALID_FORMAT, ", ".join(sorted(row))):
        ArrowDataset(path)


# ------------------------------------------------------------------ directories


def captions(count: int) -> list[dict]:
    return [{"image": "a.png", "caption": f"{number}"} for number in range(count)]


def test_arrow_dataset_is_a_sequence(tmp_path):
    table = ArrowDataset(saved(tmp_path / "t", captions(7)))
    assert answers(table) == ["0", "1", "2", "3", "4", "5", "6"]
    assert len(table) == 7
    assert table[-1] == table[6]
    assert answers(table[1:4:2]) == ["1", "3"]
    with pytest.raises(IndexError):
        table[7]


def answers(samples) -> list[str]:
    return [sample.messages[1]["content"] for sample in samples]


def test_forked_workers_read_the_same_rows(tmp_path):
    table = ArrowDataset(saved(tmp_path / "t", captions(200)))
    expected = answers(table)
    loader = torch.utils.data.DataLoader(
        table,
        batch_size=10,
        num_workers=2,
        collate_fn=answers,
        multiprocessing_context="fork",
    )
    assert [answer for batch in loader for answer in batch] == expected


def test_splits(tmp_path):
    parts = {
        name: datasets.Dataset.from_list(captions(count))
        for name, count in [("train", 3), ("dev", 2)]
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "t")
    assert len(ArrowDataset(tmp_path / "t")) == 3
    table = ArrowDataset(tmp_path / "t", "dev")
    assert (len(table), table[1].source) == (2, f"{tmp_path / 't' / 'dev'}, row 2")
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "test"):
        ArrowDataset(tmp_path / "t", "test")
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "split=dev"):
        ArrowDataset(tmp_path / "t" / "train", "dev")


def test_is_arrow_directory(tmp_path):
    path = saved(tmp_path / "t", captions(1))
    assert is_arrow_directory(path)
    assert not is_arrow_directory(tmp_path)
    assert not is_arrow_directory(path / "state.json")
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "save_to_disk"):
        ArrowDataset(tmp_path / "t2")


def test_a_table_without_rows_is_refused(tmp_path):
    datasets.Dataset.from_dict({"image": [], "caption": []}).save_to_disk(tmp_path / "t")
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        ArrowDataset(tmp_path / "t")


@pytest.mark.parametrize("damage", ["state.json", "data-00000-of-00001.arrow", "dataset_info.json"])
def test_a_damaged_directory_is_refused(tmp_path, damage):
    path = saved(tmp_path / "t", captions(3))
    (path / damage).write_bytes(b"{")
    with raises_input_error(ErrorCode.UNREADABLE_FILE):
        ArrowDataset(path)
