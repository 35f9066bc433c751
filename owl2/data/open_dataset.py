"""Opens every kind of dataset.

::

    name of a dataset               ─► load_dataset ─┐
    .json, .jsonl                   ─► JsonDataset   ├─► Sequence[Sample]
    directory from save_to_disk     ─► ArrowDataset ─┘
    tar shards                      ─► TarDataset      a stream of samples

Sequences parse and validate a row when it is accessed: `samples[i]` of an invalid row raises
`InputError`. A stream returns an `InvalidSample` instead.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from owl2.data.arrow_dataset import ArrowDataset, is_arrow_directory
from owl2.data.datasets import load_dataset
from owl2.data.json_dataset import JsonDataset, is_json_file
from owl2.data.sample import Sample
from owl2.data.webdataset import TarDataset, is_shard_url
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.registry import look_up, read_setting

SampleDataset = Sequence[Sample] | TarDataset


def open_dataset(
    *,
    dataset: str | None = None,
    file: str | None = None,
    shards: str | Sequence[str] | None = None,
    hf_dataset: str | None = None,
    images: str | None = None,
    split: str = "train",
    style: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> SampleDataset:
    """The samples of an entry under `data` in a recipe.

    Args:
        dataset: A name in `owl2.data.datasets.DATASETS`.
        file: A `.json` or `.jsonl` file.
        shards: Tar files, see `TarDataset`.
        hf_dataset: A directory written by `save_to_disk` of `datasets`.
        images: Root directory of the image paths in a `file` or `hf_dataset`; default: its own
            directory.
        split: Split of a `dataset` or `hf_dataset`.
        style: The option `style` of a `dataset`.
        options: Other options of a `dataset`.

    Raises:
        InputError: Not exactly one of the first four is given, or it cannot be opened.
    """
    if sum(origin is not None for origin in (dataset, file, shards, hf_dataset)) != 1:
        raise InputError(
            "set exactly one of dataset, file, shards and hf_dataset", ErrorCode.CONFLICT
        )
    if file is not None:
        return JsonDataset(file, images)
    if shards is not None:
        return TarDataset(shards)
    if hf_dataset is not None:
        return ArrowDataset(hf_dataset, split, images)
    assert dataset is not None
    style_option = {} if style is None else {"style": style}
    return load_dataset(dataset, split, **(options or {}), **style_option)


def open_from_cli(source: str, settings: Sequence[str] = ()) -> SampleDataset:
    """The samples that the command line names.

    Args:
        source: A `.json` or `.jsonl` file, tar files (`*` and `{000..099}` are expanded) or their
            URLs, a directory written by `save_to_disk`, or the name of a dataset.
        settings: `option=value`, the value in YAML: `images` for a file, `split` and `images` for a
            directory, `split` and the options of a dataset.

    Raises:
        InputError: A setting has no `=` or does not exist, or see `open_dataset`.
    """
    values = dict(read_setting(setting) for setting in settings)
    origins: dict[str, tuple[Callable[[str], bool], list[str]]] = {
        "file": (is_json_file, ["images"]),
        "shards": (is_shard_url, []),
        "hf_dataset": (is_arrow_directory, ["split", "images"]),
    }
    for origin, (is_of_kind, known) in origins.items():
        if is_of_kind(source):
            for name in values:
                look_up(f"setting of {source}", name, dict.fromkeys(known))
            arguments: dict[str, Any] = {name: str(value) for name, value in values.items()}
            return open_dataset(**arguments | {origin: source})
    if expand_user(source).exists():
        raise InputError(
            f"{source} is not a dataset: pass a .json or .jsonl file, .tar files, or a directory "
            "written by save_to_disk of datasets",
            ErrorCode.INVALID_FORMAT,
        )
    split = values.pop("split", "train")
    return open_dataset(dataset=source, split=split, options=values)


def unique_names(datasets: Iterable[tuple[str, SampleDataset]]) -> dict[str, SampleDataset]:
    """Datasets by name; the second with the same name becomes "NAME (2)"."""
    result: dict[str, SampleDataset] = {}
    for name, samples in datasets:
        count = sum(other == name or other.startswith(f"{name} (") for other in result)
        result[f"{name} ({count + 1})" if count else name] = samples
    return result
