"""The images of a folder, their versions, and their names in JSON files."""

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from owl2.errors import ErrorCode, InputError
from owl2.processing.media_file import IMAGE_SUFFIXES, folder_error
from owl2.processing.message_parts import has_lone_surrogate

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass
class ImageFolder:
    """The content of a folder. Names are relative to it.

    Attributes:
        versions: The images, sorted, each with its size and modification time, which show that a
            file has been replaced. The value is empty if the file cannot be accessed.
        skipped: Why an entry with the extension of an image, or a linked folder, is not read.
        unreadable: Subfolders that cannot be listed, with the reason.
    """

    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def find_images(
    folder: Path, recursive: bool = False, suffixes: Collection[str] = IMAGE_SUFFIXES
) -> ImageFolder:
    """Find the images of a folder by their file name extensions.

    Hidden files and folders are ignored. Links to files are followed, links to folders are not.

    Raises:
        InputError: The folder does not exist, cannot be listed, or has no images.
    """
    found = ImageFolder()

    def report(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder:
            raise folder_error(folder, error)
        found.unreadable[path.relative_to(folder).as_posix()] = str(error.strerror)

    versions: dict[str, str] = {}
    for directory, folders, files in os.walk(folder, onerror=report):
        place = Path(directory).relative_to(folder)
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(directory, name)):
                found.skipped[(place / name).as_posix()] = "a link to a folder"
        for name in files:
            if Path(name).suffix.lower() in suffixes and not name.startswith("."):
                kind, version = inspect_file(os.path.join(directory, name))
                target = found.skipped if kind else versions
                target[(place / name).as_posix()] = kind or version
    found.versions = dict(sorted(versions.items()))
    found.skipped = dict(sorted(found.skipped.items()))
    if not versions:
        shown = ", ".join(sorted(suffix[1:] for suffix in suffixes))
        hint = "" if recursive else " To include subfolders, add --recursive."
        raise InputError(
            f"There are no images in '{folder}' ({shown}).{hint}", ErrorCode.EMPTY_DATASET
        )
    return found


def inspect_file(path: str | Path) -> tuple[str, str]:
    """What a file is if it is not a regular file, and its version."""
    try:
        status = os.stat(path)
    except OSError:  # such as a broken link, or a file that was deleted after it was listed
        return "", ""
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "")
    return kind, f"{status.st_size}-{status.st_mtime_ns}"


# ------------------------------------------------------------------ names in JSON files
#
# Linux allows file names that are not UTF-8. Python represents their bytes by lone surrogates,
# which pyarrow, pandas and other readers reject in JSON. `to_json` writes them as readable text,
# and another field has the exact name.

QUOTED = "file_name_quoted"  # of the field "file_name"


def name_fields(name: str, key: str = "file_name") -> dict[str, str]:
    """The fields that identify a file: its name, and for names that are not UTF-8 also its bytes.

    ``os.fsdecode(urllib.parse.unquote_to_bytes(row["file_name_quoted"]))`` is the exact name.
    """
    if not has_lone_surrogate(name):
        return {key: name}
    return {key: name, f"{key}_quoted": quote(os.fsencode(name))}


def name_of(record: Mapping[str, Any], key: str = "file_name") -> str:
    """The exact name of the file that `name_fields` identifies."""
    if f"{key}_quoted" in record:
        return os.fsdecode(unquote_to_bytes(record[f"{key}_quoted"]))
    return str(record[key])


def version_fields(versions: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The fields of a report with the versions, from which `read_versions` reads them."""
    fields: dict[str, dict[str, str]] = {"files": {}}
    for name, version in versions.items():
        row = name_fields(name)
        key = "files_quoted" if QUOTED in row else "files"
        fields.setdefault(key, {})[row.get(QUOTED, name)] = version
    return fields


def read_versions(report: Mapping[str, Any]) -> dict[str, str]:
    """The versions in a report, by the exact name of the file."""
    quoted = report.get("files_quoted", {})
    return dict(report["files"]) | {name_of({QUOTED: name}): quoted[name] for name in quoted}
