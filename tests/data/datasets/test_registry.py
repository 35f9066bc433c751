from owl2.data.datasets import DATASETS, load_dataset
from owl2.errors import ErrorCode
from tests.errors import raises_input_error


def test_options_reach_the_dataset(monkeypatch):
    def colors(split: str, *, bright: bool = False) -> list[str]:
        return [f"{split} {bright}"]

    monkeypatch.setitem(DATASETS, "colors", colors)
    assert load_dataset("colors") == ["train False"]
    assert load_dataset("colors", "test", bright=True) == ["test True"]
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "brigth"):
        load_dataset("colors", brigth=True)
    for reserved in ("split", "name"):
        with raises_input_error(ErrorCode.UNKNOWN_NAME):
            load_dataset("colors", "train", **{reserved: "test"})


def test_unknown_dataset():
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "easy-vqa"):
        load_dataset("easy-vqa")
