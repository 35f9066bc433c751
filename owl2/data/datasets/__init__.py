"""Public datasets. Each module converts the files of some datasets to samples.

Datasets in installed packages are read directly by a training run (`DATASETS`). Datasets published
as large files are converted first by `owl2 data convert` (`registry.DATASET_CARDS`).

A converter is a function of the published files and of keyword options with defaults. It yields
samples whose image paths are relative, as in the authors' archives, and `SkippedRows` for known
content that cannot be trained on. Any other deviation from the published format raises `InputError`
with the file and the row.
"""

from collections.abc import Callable, Sequence
from typing import Any

from owl2.data.datasets.easy_vqa import easy_vqa
from owl2.data.sample import Sample
from owl2.registry import check_options, look_up, options_of

# Functions of the split and of keyword options with defaults.
DATASETS: dict[str, Callable[..., Sequence[Sample]]] = {"easy_vqa": easy_vqa}


def load_dataset(name: str, split: str = "train", /, **options: Any) -> Sequence[Sample]:
    """The samples of a split of a dataset in `DATASETS`.

    Raises:
        InputError: The name, the split, an option or its value is unknown.
    """
    dataset = look_up("dataset", name, DATASETS)
    check_options(f"option of the dataset {name}", options_of(dataset), options)
    return dataset(split, **options)
