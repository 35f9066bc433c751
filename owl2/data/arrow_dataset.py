"""Tables that `datasets` saved to disk, as a sequence of Samples.

The file on disk is memory-mapped: a row is read when it is taken, and rows taken before take no
memory. Columns are the keys of a row, see `readers`: messages and images, conversations and image,
or image and caption or text. Images are `datasets`' Image (not decoded here) or names of files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from owl2.data.row_parsers import ImagePathResolver, image_root, parse_row
from owl2.data.sample import Message, Sample
from owl2.errors import InputError
from owl2.registry import look_up

# What `save_to_disk` writes into the directory of a Dataset, and of a DatasetDict.
_MARKS = ("dataset_info.json", "dataset_dict.json")


def is_arrow_directory(name: str | Path) -> bool:
    """Whether this is a directory that `save_to_disk` wrote."""
    return any((Path(name) / mark).is_file() for mark in _MARKS)


class ArrowDataset(Sequence[Sample]):
    """The Samples of a directory that `save_to_disk` wrote.

    `split`: of a directory that holds several. `images`: the directory that names of images start
    from; default: the table's own. A bad row raises `InputError` with the row when it is taken.

    Raises:
        InputError: no such directory or split, columns that are no samples', no rows, or the
            package datasets is missing.
    """

    def __init__(
        self, path: str | Path, split: str = "train", images: str | Path | None = None
    ) -> None:
        self.path = Path(path)
        if not is_arrow_directory(path):
            raise InputError(f"{path} is no directory that save_to_disk of datasets wrote.")
        table = _loaded(self.path)
        if isinstance(table, dict):
            table = look_up(f"split of {path}", split, table)
            self.path /= split
        elif split != "train":
            raise InputError(f"{path} has no splits: leave out split={split}.")
        self._under = ImagePathResolver(image_root(self.path / "_", images))
        # Arrow's own rows: what they hold is not decoded.
        self._table = table.with_format("arrow")
        self._needs_columns()

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        (row,) = self._table[place].to_pylist()
        return parse_row(row, f"{self.path}, row {place + 1}", self._image)

    def _image(self, given: Any) -> Message:
        """`datasets` keeps an image as its file's bytes, or as the path of a file elsewhere."""
        if isinstance(given, dict) and given.keys() == {"bytes", "path"}:
            if given["bytes"] is not None:
                return {"type": "image", "image": given["bytes"]}
            given = given["path"]
        return self._under(given)

    def _needs_columns(self) -> None:
        columns = set(self._table.column_names)
        is_captions = columns >= {"image", "caption"} or columns >= {"image", "text"}
        if not (columns & {"messages", "conversations"} or is_captions):
            raise InputError(
                f"{self.path} has the columns {', '.join(sorted(columns))}: samples need messages "
                "(and images), conversations (and image), or image and caption or text."
            )
        if not len(self):
            raise InputError(f"{self.path} has no rows.")


def _loaded(path: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise InputError(
            f"{path} needs the package datasets: pip install 'owl2-vlm[data]'."
        ) from error
    try:
        return load_from_disk(str(path), keep_in_memory=False)
    except IndexError as error:  # so `datasets` fails where there is nothing
        raise InputError(f"{path} has no rows.") from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
