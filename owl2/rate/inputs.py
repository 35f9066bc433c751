"""The images and videos that a command rates: folders, files, and JSONL files with paths."""

from collections.abc import Sequence
from pathlib import Path

from owl2.data.image_folder import ImageFolder, find_images, inspect_file
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.json_records import json_lines
from owl2.processing.media_file import IMAGE_SUFFIXES
from owl2.processing.video import VIDEO_SUFFIXES

PATH_KEYS = ("image", "video", "file_name")  # of rows of JSONL files; the first that is present


def find_inputs(sources: Sequence[Path], kind: str, recursive: bool = False) -> ImageFolder:
    """All images or videos of the sources, by their paths.

    Args:
        sources: Folders, images or videos, and JSONL files whose rows have a path under one of
            `PATH_KEYS`, relative to the file.
        kind: "image" or "video": the files that are found in folders.

    Raises:
        InputError: A source does not exist, a folder has no such files, or a row has no path.
    """
    found = ImageFolder()
    suffixes = (*VIDEO_SUFFIXES, ".gif") if kind == "video" else IMAGE_SUFFIXES
    for source in sources:
        if source.is_dir():
            folder = find_images(source, recursive, suffixes)
            for name in ("versions", "skipped", "unreadable"):
                rows = getattr(folder, name).items()
                getattr(found, name).update({str(source / key): row for key, row in rows})
            continue
        if not source.exists():
            raise InputError(
                f"There is no file or folder '{source}'. Check the path.", ErrorCode.FILE_NOT_FOUND
            )
        is_list = source.suffix.lower() == ".jsonl"
        for path in _listed(source) if is_list else [source]:
            special, version = inspect_file(path)
            if special:
                found.skipped[str(path)] = special
            else:
                found.versions[str(path)] = version
    if not found.versions:
        raise InputError(f"There are no {kind}s to rate.", ErrorCode.EMPTY_DATASET)
    return found


def _listed(file: Path) -> list[Path]:
    """The paths in a JSONL file."""
    paths = []
    for record in json_lines(file):
        key = next((key for key in PATH_KEYS if key in record.value), PATH_KEYS[0])
        paths.append(file.parent / expand_user(record.text(key)))
    return paths
