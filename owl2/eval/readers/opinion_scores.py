"""Rows of label files with opinion scores of images and videos.

The files are those of Q-Align (``playground/data/test_jsons``), of DeQA-Score
(``metas/test_*.json``), or of the authors of a dataset. A row has the columns `id`, `names` (of
the image or video; the first that exists is rated), `mos` (larger is better), and `normal`: the
mean and the standard deviation in the range 1 to 5, or None.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any
from zipfile import BadZipFile

from owl2.errors import ErrorCode, InputError, require_package
from owl2.eval.readers import EvalData
from owl2.eval.readers.rows import Row, read_table, read_text
from owl2.eval.samples import InvalidEvalSample
from owl2.json_records import JsonRecord, json_object, json_rows, readable

# The first of these columns that a row has.
NAMES = ("image", "img_path", "image_name", "dist_img", "name", "Image name", "flickr_id")
SCORES = ("gt_score", "MOS", "mos", "mos_quality", "dmos")
# Columns of the test split, and their values there.
SPLITS = {"set": ("test",), "is_test": ("true", "1", "1.0")}
SPLIT_FILES = ("split.json", "metas/split.json")  # of DeQA-Score: {"train": [...], "test": [...]}
AVA_TEST = ("aesthetics_image_lists/generic_test.jpgl", "generic_test.jpgl")
AVA_FIELDS = 15  # number, id, 10 counts of the scores 1 to 10, 2 tags, challenge
MEDIA = (".bmp", ".gif", ".jpeg", ".jpg", ".mp4", ".png")  # suffixes of media files
CSIQ_SHEET = "all_by_image"
CSIQ_LEVEL = re.compile(r"\.(\d)\.\w+$")  # of the distortion, in the name of the file
# CSIQ: names of distortions in the sheet → folder and part of the file name.
CSIQ_NAMES = {
    "noise": ("awgn", "AWGN"),
    "blur": ("blur", "BLUR"),
    "contrast": ("contrast", "contrast"),
    "fnoise": ("fnoise", "fnoise"),
    "jpeg": ("jpeg", "JPEG"),
    "jpeg 2000": ("jpeg2000", "jpeg2000"),
}


def rows(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """The rows of the test split if the file names one, or else all rows.

    Raises:
        InputError: The file cannot be read; openpyxl (.xlsx) or scipy (.mat) is missing.
    """
    path = paths[0]
    test = _test_names(path, data)
    for number, raw in enumerate(_READERS[path.suffix](path), start=1):
        if isinstance(raw, InvalidEvalSample):
            yield raw
            continue
        where = raw.where or f"{path}, row {number}"
        is_test = (str(raw.value.get(key, of[0])).lower() in of for key, of in SPLITS.items())
        if not all(is_test):
            continue
        try:
            value = _opinion(raw.value)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            yield InvalidEvalSample(f"row {number}", f"{where}: no name or no score: {error!r}")
            continue
        if test is None or PurePath(value["names"][0]).name in test:
            yield JsonRecord(value, where)


def rows_of_training_set(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """`rows` of a dataset that models are trained on, with a remark if there is no test split."""
    path = paths[0]
    if not path.name.startswith("test_") and _test_names(path, data) is None:
        data.remarks.append(
            f"{path.name} has no test split, so that all images are rated, also those of the "
            "training of published models; split.json next to it selects the test split."
        )
    return rows(paths, data)


def dmos(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """`rows` of differential opinion scores, of which smaller is better."""
    return map(_negate, rows(paths, data))


def csiq(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """`rows` of CSIQ, with DMOS or MOS: images of the first level of distortion are better."""
    found = list(rows(paths, data))
    levels: dict[str, list[float]] = {"1": [], "5": []}
    for row in found:
        if isinstance(row, JsonRecord) and (level := CSIQ_LEVEL.search(row.value["id"])):
            levels.setdefault(level[1], []).append(row.value["mos"])
    is_dmos = all(levels.values()) and fmean(levels["1"]) < fmean(levels["5"])
    return map(_negate, found) if is_dmos else iter(found)


def _negate(row: Row) -> Row:
    if isinstance(row, JsonRecord):
        return JsonRecord({**row.value, "mos": -row.value["mos"]}, row.where)
    return row


def _opinion(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row. Raises `KeyError`, `ValueError` or `TypeError` if it has no score."""
    if "dst_type" in row:
        name = _csiq_name(row)
    else:
        name = str(row[next((column for column in NAMES if column in row), NAMES[0])]).strip()
        name = name.removesuffix(".0") if "flickr_id" in row else name
    column = next((column for column in SCORES if column in row), None)
    # The rows of KADID in Q-Align have their score in the id only: "I66_01_01.png->4.63".
    score = float(row["id"].split("->")[1] if column is None else row[column])
    if score != score:
        raise ValueError("the score is not a number")
    normal = None
    if "gt_score_norm" in row and "std_norm" in row:
        normal = [float(row["gt_score_norm"]), float(row["std_norm"])]
    return {"id": name, "names": _alternatives(name), "mos": score, "normal": normal}


def _csiq_name(row: dict[str, Any]) -> str:
    image, level = row["image"], int(row["dst_lev"])
    image = str(int(image)) if isinstance(image, float) else image
    folder, part = CSIQ_NAMES[row["dst_type"]]
    return f"dst_imgs/{folder}/{image}.{part}.{level}.png"


def _alternatives(name: str) -> list[str]:
    """A name as it is, and without the folders that Q-Align and DeQA-Score use.

    The label files of LSVQ and KoNViD-1k have no extensions. Some files of TID2013 have the first
    letter in lower case.
    """
    path = PurePath(name)
    names = [name, "/".join(path.parts[1:]) or name, path.name]
    if re.match(r"i\d\d_", path.name, re.IGNORECASE):
        names.append(path.name[0].swapcase() + path.name[1:])
    if path.suffix.lower() not in MEDIA:
        names.append(f"{name}.mp4")
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------ formats


def _xlsx(path: Path) -> Iterator[Row]:
    """SPAQ, CSIQ: the rows below the header, which need not be the first row."""
    require_package("openpyxl", "An .xlsx file", "eval")
    from openpyxl import load_workbook

    sheet = CSIQ_SHEET if "dmos" in path.name.lower() else None
    header: tuple[Any, ...] | None = None
    with readable(path):
        try:
            with closing(load_workbook(path, read_only=True, data_only=True)) as workbook:
                table = workbook[sheet] if sheet else workbook.worksheets[0]
                rows = list(table.iter_rows(values_only=True))
        except (BadZipFile, LookupError, SyntaxError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} is not an .xlsx file{f' with a sheet {sheet}' if sheet else ''}: {error}",
                ErrorCode.INVALID_FORMAT,
            ) from error
    for cells in rows:
        if header is None:
            is_header = {"image", "dmos"} <= {*cells} or {"Image name", "MOS"} <= {*cells}
            header = cells if is_header else None
            continue
        pairs = zip(header, cells, strict=False)
        if row := {name: cell for name, cell in pairs if name and cell not in (None, "")}:
            yield JsonRecord(row, "")
    if header is None:
        raise InputError(
            f"{path} has no row with the titles of the columns.", ErrorCode.INVALID_FORMAT
        )


def _mat(path: Path) -> Iterator[Row]:
    """LIVE in the Wild: ``AllMOS_release.mat``, with the names in ``AllImages_release.mat``."""
    require_package("scipy", "A .mat file", "eval")
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    variables = []
    for key in ("AllImages_release", "AllMOS_release"):
        file = path.with_name(f"{key}.mat")
        with readable(file):
            try:
                variables.append(loadmat(file)[key].ravel())
            except (MatReadError, KeyError, ValueError, TypeError, NotImplementedError) as error:
                raise InputError(
                    f"{file} has no {key}: {error!r}", ErrorCode.INVALID_FORMAT
                ) from error
    if len({len(values) for values in variables}) > 1:
        raise InputError(
            f"{path} and AllImages_release.mat have other numbers of images.",
            ErrorCode.INVALID_FORMAT,
        )
    for name, score in zip(*variables, strict=True):
        yield JsonRecord({"name": str(name.item()), "MOS": float(score)}, "")


def _txt(path: Path) -> Iterator[Row]:
    """TID2013: "MOS name". MaxWell: "name, -1, -1, MOS". AVA: `AVA_FIELDS` numbers."""
    for line in filter(str.strip, read_text(path).splitlines()):
        parts = [part.strip() for part in line.split(",")] if "," in line else line.split()
        if "," in line:
            yield JsonRecord({"name": parts[0], "mos": parts[-1]}, "")
        elif len(parts) == AVA_FIELDS and all(map(str.isdecimal, parts[2:12])):
            counts = [int(part) for part in parts[2:12]]
            total = sum(number * count for number, count in enumerate(counts, start=1))
            yield JsonRecord({"name": f"{parts[1]}.jpg", "mos": total / max(1, sum(counts))}, "")
        elif len(parts) == 2:
            yield JsonRecord({"name": parts[1], "mos": parts[0]}, "")
        else:
            yield InvalidEvalSample(line[:40], f"{path}: {line[:80]!r} is not a name with a score.")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": json_rows,
    ".csv": partial(read_table, delimiter=","),
    ".xlsx": _xlsx,
    ".mat": _mat,
    ".txt": _txt,
}


def _test_names(path: Path, data: EvalData) -> set[str] | None:
    """File names of the test split, from a separate file; None without one."""
    is_list = path.name.startswith("test_")
    ava = _optional(AVA_TEST, data) if path.name == "AVA.txt" else None
    if ava is not None:
        return {f"{number}.jpg" for number in read_text(ava).split()}
    split = None if is_list or path.suffix == ".txt" else _optional(SPLIT_FILES, data)
    if split is None:
        return None
    return {PurePath(name).name for name in json_object(split).texts("test")}


def _optional(names: tuple[str, ...], data: EvalData) -> Path | None:
    path = data.find(names)
    if path is not None and path not in data.files:
        data.files.append(path)
    return path
