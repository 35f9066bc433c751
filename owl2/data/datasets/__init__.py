"""Public datasets by name. Each file here turns a dataset's own files into Samples."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from owl2.data.datasets.easy_vqa import easy_vqa
from owl2.data.names import look_up
from owl2.data.sample import Sample

# A dataset is a function of the split, and of keyword options that have defaults.
DATASETS: dict[str, Callable[..., Sequence[Sample]]] = {"easy_vqa": easy_vqa}


def load_dataset(name: str, split: str = "train", /, **options: Any) -> Sequence[Sample]:
    """The Samples of a split of a dataset in `DATASETS`.

    Raises:
        InputError: an unknown name, split or option, or an option's value that it does not know.
    """
    dataset = look_up("dataset", name, DATASETS)
    known = {
        parameter.name: parameter
        for parameter in inspect.signature(dataset).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in options:
        look_up(f"option of the dataset {name}", option, known)
    return dataset(split, **options)
