"""Whether the weight files of a directory are weights, seen from their headers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from owl2.errors import InputError

# In the order in which transformers looks for them.
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
ZIP, GIT_LFS = b"PK\x03\x04", b"version https://git-lfs"


def check_weight_files(folder: Path, safetensors: bool = True) -> list[str]:
    """Look at the weight files that a local directory is loaded from; there may be none.

    Args:
        safetensors: whether they may be read in this format.

    Returns:
        the names of the tensors that are no floating-point numbers.

    Raises:
        InputError: a file that is no weights (broken, empty, text, other pickled things), or an
            index that names files elsewhere.
    """
    return [name for file in weight_files(folder, safetensors) for name in check_weight_file(file)]


def weight_files(folder: Path, safetensors: bool = True) -> list[Path]:
    """The files that a local directory's weights are read from; there may be none."""
    for stem, suffix in KINDS if safetensors else KINDS[1:]:
        if files := _files_of(folder, stem, suffix):
            return files
    return []


def _files_of(folder: Path, stem: str, suffix: str) -> list[Path]:
    whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        # One that is not there is transformers' to name.
        return [folder / name for name in _shards(index) if (folder / name).is_file()]
    return sorted(folder.glob(f"{stem}.*{suffix}"))  # variants, as model.fp16.safetensors


def _shards(index: Path) -> list[str]:
    _refuse_placeholder(index)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights: {error!r}") from error
    for name in names:
        # Both separators on every system: a checkpoint must not depend on where it is read.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\"}:
            raise InputError(f"{index}: {name!r} is no name of a file in this directory")
    return sorted(names)


def check_weight_file(file: Path) -> list[str]:
    """Names of the file's tensors that are no floating-point numbers.

    Raises:
        InputError: it is no file of weights.
    """
    _refuse_placeholder(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  # no dict
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is broken, or no safetensors file: {error}") from error
        return [name for name, kind in kinds.items() if kind[0] in "IUC" or kind == "BOOL"]
    tensors = load_pickle_weights(file)
    return [name for name, tensor in tensors.items() if not tensor.is_floating_point()]


def load_pickle_weights(file: Path, place: str = "meta") -> dict[str, torch.Tensor]:
    """What a ``.bin`` holds; numbers are read when they are looked at, which `place` meta forbids.

    The format before torch 1.6 is read whole.
    """
    with file.open("rb") as opened:
        zipped = opened.read(len(ZIP)) == ZIP
    place = place if zipped else "cpu"
    try:
        tensors: Any = torch.load(file, map_location=place, mmap=zipped, weights_only=True)
    except Exception as error:  # unpickling raises whatever the bytes lead it to
        # Not torch's own words: they advise to switch its safety off.
        raise InputError(
            f"{file} cannot be read as weights: it is broken, or holds more than tensors, which "
            f"is not loaded because it could run code ({type(error).__name__})"
        ) from error
    if not isinstance(tensors, dict):
        raise InputError(f"{file} holds a {type(tensors).__name__}, no weights by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{file}: {name!r} is a {type(tensor).__name__}, no tensor")
    return tensors


def _refuse_placeholder(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(len(GIT_LFS))
    if not start:
        raise InputError(f"{file} is empty")
    if start == GIT_LFS:
        raise InputError(f"{file} is git-lfs's pointer to the file: run `git lfs pull` there")
