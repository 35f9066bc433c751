"""Rows of .xlsx files, the format of the opinion scores of SPAQ and CSIQ."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile

from owl2.errors import ErrorCode, InputError
from owl2.json_records import readable

_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def read_sheet(path: Path, sheet: str | None = None) -> Iterator[dict[str, Any]]:
    """The cells of each row by column letter: texts and numbers. Empty cells are absent.

    Args:
        sheet: Its name; None for the first one.

    Raises:
        InputError: The file cannot be read, is no .xlsx file, or has no such sheet.
    """
    with readable(path):
        try:
            with ZipFile(path) as archive:
                yield from _rows(archive, sheet)
        except (BadZipFile, KeyError, ElementTree.ParseError, ValueError, IndexError) as error:
            raise InputError(
                f"{path} is not an .xlsx file{f' with a sheet {sheet}' if sheet else ''}: {error}",
                ErrorCode.INVALID_FORMAT,
            ) from error


def _rows(archive: ZipFile, sheet: str | None) -> Iterator[dict[str, Any]]:
    strings = []
    if "xl/sharedStrings.xml" in archive.namelist():
        strings = [_text(item) for item in _parse(archive, "xl/sharedStrings.xml")]
    ids = {
        one.attrib["name"]: one.attrib[_RELATION]
        for one in _parse(archive, "xl/workbook.xml").iter(f"{_MAIN}sheet")
    }
    files = {
        one.attrib["Id"]: one.attrib["Target"]
        for one in _parse(archive, "xl/_rels/workbook.xml.rels")
    }
    target = files[ids[sheet] if sheet else next(iter(ids.values()))]
    name = target.removeprefix("/") if target.startswith("/") else f"xl/{target}"
    for row in _parse(archive, name).iter(f"{_MAIN}row"):
        cells = {}
        for cell in row:
            value = _value(cell, strings)
            if value not in (None, ""):
                cells[re.sub(r"\d", "", cell.attrib["r"])] = value
        if cells:
            yield cells


def _value(cell: ElementTree.Element, strings: list[str]) -> Any:
    kind, value = cell.get("t", "n"), cell.find(f"{_MAIN}v")
    if kind == "inlineStr":
        return _text(cell)
    if value is None or value.text is None:
        return None
    if kind == "s":
        return strings[int(value.text)]
    return float(value.text) if kind == "n" else value.text


def _text(element: ElementTree.Element) -> str:
    """The text of a string, which may be in several runs."""
    return "".join(part.text or "" for part in element.iter(f"{_MAIN}t"))


def _parse(archive: ZipFile, name: str) -> ElementTree.Element:
    return ElementTree.fromstring(archive.read(name))
