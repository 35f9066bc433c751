"""Directories written by `datasets`' `save_to_disk` as a dataset with random access.

The files are memory-mapped: a row is read when it is accessed. The columns are the keys of a row
in `row_parsers`. Images are an `Image` column of `datasets`, not decoded here, or file names.
"""

from pathlib import Path
from typing import Any

from owl2.data.row_formats import require_format
from owl2.data.row_parsers import image_reader, image_root, parse_row
from owl2.data.sample import Message, RowDataset, Sample
from owl2.errors import ErrorCode, InputError, require_package
from owl2.files import expand_user
from owl2.registry import look_up

# The files that `save_to_disk` writes for a Dataset and for a DatasetDict.
_MARKERS = ("dataset_info.json", "dataset_dict.json")


def is_arrow_directory(name: str | Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return any((expand_user(name) / marker).is_file() for marker in _MARKERS)


class ArrowDataset(RowDataset):
    """The samples of a directory that `save_to_disk` wrote.

    Args:
        split: The split of a directory with several.
        images: Root directory of image paths; default: `path`.

    Raises:
        InputError: There is no such directory or split, the columns do not form samples, there are
            no rows, or the package datasets is not installed. When a row is accessed: the row is
            not valid.
    """

    def __init__(
        self, path: str | Path, split: str = "train", images: str | Path | None = None
    ) -> None:
        self.path = expand_user(path)
        if not is_arrow_directory(path):
            raise InputError(
                f"{path} was not written by save_to_disk of datasets", ErrorCode.FILE_NOT_FOUND
            )
        table = _load(self.path)
        if isinstance(table, dict):
            table = look_up(f"split of {path}", split, table)
            self.path /= split
        elif split != "train":
            raise InputError(f"{path} has no splits: remove split={split}", ErrorCode.UNKNOWN_NAME)
        if not len(table):
            raise InputError(f"{self.path} has no rows", ErrorCode.EMPTY_DATASET)
        require_format(table.column_names, str(self.path))
        self._resolve_path = image_reader(image_root(self.path, images))
        self._table = table.with_format("arrow")  # values are not decoded

    def __len__(self) -> int:
        return len(self._table)

    def source(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def read(self, index: int) -> Sample:
        """The sample at `index`."""
        (row,) = self._table[index].to_pylist()
        return parse_row(row, self.source(index), self._image)

    def _image(self, value: Any) -> Message:
        """`datasets` stores an image as the bytes of its file, or as the path of another file."""
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            if value["bytes"] is not None:
                return {"type": "image", "image": value["bytes"]}
            value = value["path"]
        return self._resolve_path(value)


def _load(path: Path) -> Any:
    require_package("datasets", str(path), "data")
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path), keep_in_memory=False)
    except IndexError as error:  # raised by `datasets` for a table without rows
        raise InputError(f"{path} has no rows", ErrorCode.EMPTY_DATASET) from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}", ErrorCode.UNREADABLE_FILE) from error
