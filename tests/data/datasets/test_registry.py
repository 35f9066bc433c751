import pytest

from owl2.data.datasets import DATASETS, load_dataset
from owl2.errors import InputError


def test_options_reach_the_dataset(monkeypatch):
    def colors(split: str, *, bright: bool = False) -> list[str]:
        return [f"{split} {bright}"]

    monkeypatch.setitem(DATASETS, "colors", colors)
    assert load_dataset("colors") == ["train False"]
    assert load_dataset("colors", "test", bright=True) == ["test True"]
    with pytest.raises(InputError, match=r"'brigth' is no option .* Do you mean 'bright'"):
        load_dataset("colors", brigth=True)
    for reserved in ("split", "name"):
        with pytest.raises(InputError, match=f"'{reserved}' is no option"):
            load_dataset("colors", "train", **{reserved: "test"})


def test_unknown_dataset():
    with pytest.raises(InputError, match=r"'easy-vqa' is no dataset\. Do you mean 'easy_vqa'"):
        load_dataset("easy-vqa")
