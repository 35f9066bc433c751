"""Public datasets by name. Each file here turns a dataset's own files into Samples.

There are two kinds: what a package carries is read anew for each run (`DATASETS`, here); what is
published as large files is first written down as a file of samples (`public.PUBLIC`, for
`owl2 data convert`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from owl2.data.datasets.easy_vqa import easy_vqa
from owl2.data.sample import Sample
from owl2.registry import check_options, look_up

# A dataset is a function of the split, and of keyword options that have defaults.
DATASETS: dict[str, Callable[..., Sequence[Sample]]] = {"easy_vqa": easy_vqa}


def load_dataset(name: str, split: str = "train", /, **options: Any) -> Sequence[Sample]:
    """The Samples of a split of a dataset in `DATASETS`.

    Raises:
        InputError: an unknown name, split or option, or an option's value that it does not know.
    """
    dataset = look_up("dataset", name, DATASETS)
    check_options(f"option of the dataset {name}", dataset, options)
    return dataset(split, **options)
