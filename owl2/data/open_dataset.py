"""One way to open all that samples come from.

::

    a dataset's name ─► load_dataset ─┐
    .json, .jsonl    ─► JsonDataset          ├─► Sequence[Sample]: a length, any place, flat memory
    save_to_disk's   ─► ArrowDataset ────────┘
    tar shards       ─► TarDataset            a stream

JsonDataset and tables are parsed and checked one by one when taken: `samples[i]` of a bad row raises
`InputError` with the file and the row. A stream gives a `Bad` in its place.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from owl2.data.arrow_dataset import ArrowDataset, is_arrow_directory
from owl2.data.datasets import load_dataset
from owl2.data.json_dataset import JsonDataset, is_json_file
from owl2.data.sample import Sample
from owl2.data.webdataset import TarDataset, is_shard_url
from owl2.errors import InputError
from owl2.registry import read_setting

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
    """What a recipe's entry under `data` names → its SampleDataset; give one of the first four.

    `images`: the directory that image paths in a file or table start from; default: the one
    that it lies in. `split`: of a dataset or table. `style` and `options`: a dataset's own.

    Raises:
        InputError: none or several given; see `load_dataset`, `JsonDataset`, `TarDataset`, `ArrowDataset`.
    """
    if sum(origin is not None for origin in (dataset, file, shards, hf_dataset)) != 1:
        raise InputError("Give one of dataset, file, shards and hf_dataset to read samples from.")
    if file is not None:
        return JsonDataset(file, images)
    if shards is not None:
        return TarDataset(shards)
    if hf_dataset is not None:
        return ArrowDataset(hf_dataset, split, images)
    assert dataset is not None
    return load_dataset(dataset, split, **_dataset_options(style, options))


def open_from_cli(source: str, settings: Sequence[str] = ()) -> SampleDataset:
    """What the command line names, with `key=value` settings, → its SampleDataset.

    `source`: a .json or .jsonl file; tar files (`*` and `{000..099}` are expanded) or their urls; a
    directory that save_to_disk wrote; else a dataset's name. A dataset takes `split` and its own
    options, a table `split` and `images`, a file `images`. Values are read as YAML.

    Raises:
        InputError: a setting without `=` or that the source does not have; see `open_dataset`.
    """
    given = dict(read_setting(setting) for setting in settings)
    if is_json_file(source):
        return open_dataset(file=source, **_only(given, "A file", "images"))
    if is_shard_url(source):
        return open_dataset(shards=source, **_only(given, "TarDataset"))
    if is_arrow_directory(source):
        return open_dataset(hf_dataset=source, **_only(given, "A table", "split", "images"))
    if Path(source).exists():
        raise InputError(
            f"{source} holds no samples: give a .json or .jsonl file, .tar files, or a directory "
            "that save_to_disk of datasets wrote."
        )
    split = given.pop("split", "train")
    return open_dataset(dataset=source, split=split, options=given)


def _dataset_options(style: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(options or {}) | ({} if style is None else {"style": style})


def _only(given: dict[str, Any], kind: str, *known: str) -> dict[str, Any]:
    if others := sorted(given.keys() - set(known)):
        have = f"only {' and '.join(known)} can be set" if known else "nothing can be set"
        raise InputError(f"{kind} has no setting {', '.join(others)}: {have}.")
    return {key: str(value) for key, value in given.items()}
