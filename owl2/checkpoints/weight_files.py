"""Weight files: which files a checkpoint has, and their headers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from owl2.errors import ErrorCode, InputError

# In the order in which transformers searches.
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
ZIP, GIT_LFS = b"PK\x03\x04", b"version https://git-lfs"
# Arguments of `cached_file` for a file that the hub or its cache may not have.
OPTIONAL_FILE: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class TensorHeader(NamedTuple):
    """Shape and kind of a stored tensor."""

    shape: tuple[int, ...]
    is_floating_point: bool


def read_headers(folder: Path, safetensors: bool = True) -> dict[str, TensorHeader]:
    """Headers of the weights of a local directory, by name; empty if it has no weights.

    Args:
        safetensors: Whether files of this format are used.

    Raises:
        InputError: A file does not contain weights (corrupt, empty, text, other pickled objects),
            or an index names files in other directories.
    """
    return {
        name: header
        for file in weight_files(folder, safetensors)
        for name, header in read_header(file).items()
    }


def find_tensor(
    repo: str, name: str, hub: dict[str, Any], safetensors: bool, variant: str | None
) -> TensorHeader | None:
    """Header of one tensor of a hub repository, whose file is downloaded; None if not found.

    Args:
        hub: Arguments of `cached_file` (``revision``, ``cache_dir`` ...).
    """
    for stem, suffix in KINDS if safetensors else KINDS[1:]:
        file_name = f"{stem}.{variant}{suffix}" if variant else f"{stem}{suffix}"
        file = cached_file(repo, file_name, **OPTIONAL_FILE, **hub)
        if file is None:
            index_name = f"{stem}{suffix}.index{f'.{variant}' if variant else ''}.json"
            index = cached_file(repo, index_name, **OPTIONAL_FILE, **hub)
            shard = _weight_map(Path(index)).get(name) if index else None
            file = cached_file(repo, shard, **OPTIONAL_FILE, **hub) if shard else None
        if file is not None:
            return read_header(Path(file)).get(name)
    return None


def weight_files(folder: Path, safetensors: bool = True) -> list[Path]:
    """The files that the weights of a local directory are read from; may be empty."""
    for stem, suffix in KINDS if safetensors else KINDS[1:]:
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            # transformers reports a missing shard.
            shards = sorted(set(_weight_map(index).values()))
            files = [folder / name for name in shards if (folder / name).is_file()]
        else:
            files = sorted(folder.glob(f"{stem}.*{suffix}"))  # variants: model.fp16.safetensors
        if files:
            return files
    return []


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor name. Raises `InputError` for names outside the directory."""
    _check_is_file_content(index)
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(names.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not an index of weights: {error!r}", ErrorCode.INVALID_FORMAT
        ) from error
    for name in files:
        # Both separators on every system: a checkpoint must not depend on where it is read.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\"}:
            raise InputError(
                f"{index}: {name!r} is not the name of a file in this directory",
                ErrorCode.INVALID_FORMAT,
            )
    return names


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Headers of the tensors of a file, by name.

    Raises:
        InputError: The file does not contain weights.
    """
    _check_is_file_content(file)
    if file.suffix != ".safetensors":
        return {
            name: TensorHeader(tuple(tensor.shape), tensor.is_floating_point())
            for name, tensor in load_pickle_weights(file).items()
        }
    headers = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                part = opened.get_slice(name)
                is_integer = part.get_dtype()[0] in "IUC" or part.get_dtype() == "BOOL"
                headers[name] = TensorHeader(tuple(part.get_shape()), not is_integer)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is corrupt or not a safetensors file: {error}", ErrorCode.UNREADABLE_FILE
        ) from error
    return headers


def load_pickle_weights(file: Path, device: str = "meta") -> dict[str, torch.Tensor]:
    """Tensors of a ``.bin`` file, by name. On the device "meta" no values are read.

    The format before torch 1.6 is always read completely, on the CPU.
    """
    with file.open("rb") as opened:
        zipped = opened.read(len(ZIP)) == ZIP
    device = device if zipped else "cpu"
    try:
        tensors: Any = torch.load(file, map_location=device, mmap=zipped, weights_only=True)
    except Exception as error:  # unpickling raises exceptions of any type
        # Without torch's message, which recommends weights_only=False.
        raise InputError(
            f"{file} cannot be read as weights: it is corrupt, or contains objects other than "
            f"tensors, which are not loaded because they could run code ({type(error).__name__})",
            ErrorCode.UNREADABLE_FILE,
        ) from error
    is_dict = isinstance(tensors, dict)
    if not is_dict or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{file} does not contain a dict of tensors", ErrorCode.INVALID_FORMAT)
    return tensors


def _check_is_file_content(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(len(GIT_LFS))
    if not start:
        raise InputError(f"{file} is empty", ErrorCode.UNREADABLE_FILE)
    if start == GIT_LFS:
        raise InputError(
            f"{file} is a git-lfs pointer: run `git lfs pull` in its directory",
            ErrorCode.UNREADABLE_FILE,
        )
