"""Weight files: their tensors, and the fingerprint of a checkpoint.

The fingerprint shows whether weights are the ones that an adapter was trained on. It is a hash of
the first values of every tensor. It takes about a second for any size, changes with every training,
and does not depend on the file format or the shards.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file, extract_commit_hash

from owl2.checkpoints.config_file import CONFIG_FILE, find_file, read_json
from owl2.checkpoints.weight_names import released_name
from owl2.errors import ErrorCode, InputError

# In the order in which transformers searches.
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
OTHER_FILES = (CONFIG_FILE, "generation_config.json")
ZIP, GIT_LFS = b"PK\x03\x04", b"version https://git-lfs"
VALUES_PER_TENSOR = 16
# Computed, not learned: checkpoints may or may not contain these.
COMPUTED_KEYS = ("_pos_embed", ".inv_freq")


def weight_files(folder: Path, safetensors: bool = True) -> list[Path]:
    """The files that the weights of a local directory are read from; may be empty.

    Args:
        safetensors: Whether files of this format are used.

    Raises:
        InputError: An index is corrupt or names files in other directories.
    """
    for stem, suffix in KINDS if safetensors else KINDS[1:]:
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            # transformers reports a missing shard.
            names = sorted(set(_shards(index).values()))
            files = [folder / name for name in names if (folder / name).is_file()]
        else:
            files = sorted(folder.glob(f"{stem}.*{suffix}"))  # variants: model.fp16.safetensors
        if files:
            return files
    return []


def find_tensor(name: str | Path, key: str, safetensors: bool, hub: dict[str, Any]) -> Path | None:
    """The file of a checkpoint (a directory or a hub id) that contains the tensor `key`.

    A file without shards is not read: it may lack the tensor.
    """
    for stem, suffix in KINDS if safetensors else KINDS[1:]:
        if single := find_file(name, f"{stem}{suffix}", hub):
            return single
        if index := find_file(name, f"{stem}{suffix}.index.json", hub):
            shard = _shards(index).get(key)
            return find_file(name, shard, hub) if shard else None
    return None


@contextmanager
def complete_index(
    name: str | Path, safetensors: bool, hub: dict[str, Any]
) -> Iterator[str | Path]:
    """`name`, or a copy with links if its index has no ``metadata``, which transformers requires.

    Args:
        name: A directory or a hub id; its files are downloaded in the second case.
    """
    for stem, suffix in KINDS if safetensors else KINDS[1:]:
        if find_file(name, f"{stem}{suffix}", hub):
            break
        if index := find_file(name, f"{stem}{suffix}.index.json", hub):
            content = read_json(index)
            if isinstance(content.get("metadata"), dict):
                break
            shards = set(_shards(index).values())
            files = [find_file(name, file, hub) for file in (*shards, *OTHER_FILES)]
            with TemporaryDirectory() as folder:
                target = Path(folder, hub.get("subfolder") or "")
                target.mkdir(exist_ok=True, parents=True)
                for file in filter(None, files):
                    (target / file.name).symlink_to(file.absolute())
                (target / index.name).write_text(json.dumps(content | {"metadata": {}}))
                yield folder
            return
    yield name


def _shards(index: Path) -> dict[str, str]:
    """The file name of each tensor."""
    try:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(shards.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not an index of weights: {error!r}", ErrorCode.INVALID_FORMAT
        ) from error
    for name in names:
        # Both separators on every system: a checkpoint must not depend on where it is read.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\"}:
            raise InputError(
                f"{index}: {name!r} is not the name of a file in this directory",
                ErrorCode.INVALID_FORMAT,
            )
    return shards


def read_tensors(file: Path, device: str = "meta") -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` or ``.bin`` file, by name.

    On the device "meta" no values are read, and on "cpu" a value is read when it is used. Pickles
    in the format before torch 1.6 are always read completely.

    Raises:
        InputError: The file cannot be read, or does not contain weights (corrupt, empty, text,
            other objects).
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(GIT_LFS))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error.strerror}", ErrorCode.UNREADABLE_FILE
        ) from error
    if start in (b"", GIT_LFS):
        problem = "a git-lfs pointer: run `git lfs pull` in its directory" if start else "empty"
        raise InputError(f"{file} is {problem}", ErrorCode.UNREADABLE_FILE)
    is_old = file.suffix != ".safetensors" and not start.startswith(ZIP)
    try:
        tensors: Any = load_state_dict(file, "cpu" if is_old else device)
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


def fingerprint(folder: Path) -> str | None:
    """Fingerprint of the weights in a local directory; None if it has no weights.

    Raises:
        InputError: A file does not contain weights.
    """
    entries: dict[str, bytes] = {}
    for file in weight_files(folder):  # one at a time, because each is memory-mapped
        for stored, tensor in read_tensors(file, "cpu").items():
            name = released_name(stored)
            if stored.endswith(COMPUTED_KEYS):
                continue
            entries[name] = f"{name} {tuple(tensor.shape)}\n".encode()
            # `flatten` of a tensor that is not contiguous would read all of it.
            while tensor.dim() > 1:
                tensor = tensor[0]
            # float32 represents every 16-bit float exactly, and NumPy has no bfloat16.
            values = tensor.flatten()[:VALUES_PER_TENSOR].to(torch.float32)
            entries[name] += values.numpy().tobytes()
    digest = hashlib.sha256(b"".join(entry for _, entry in sorted(entries.items())))
    return digest.hexdigest() if entries else None


@dataclass(frozen=True)
class Provenance:
    """A local directory (`name` is its absolute path), or a hub repository at one revision."""

    name: str
    revision: str | None
    folder: Path | None  # the directory of the files; None if they are not in the hub's cache

    @classmethod
    def of(cls, name_or_path: str | Path, hub: dict[str, Any]) -> "Provenance":
        """The provenance of a model that transformers has just loaded.

        Args:
            hub: Location arguments of `from_pretrained` (``subfolder``, ``revision`` ...).
        """
        if Path(name_or_path).is_dir():
            # Absolute, so that it can be found from another working directory.
            folder = os.path.abspath(Path(name_or_path) / (hub.get("subfolder") or ""))
            return cls(folder, None, Path(folder))
        local = hub | {"local_files_only": True, "force_download": False}
        file = cached_file(
            str(name_or_path), CONFIG_FILE, _raise_exceptions_for_missing_entries=False, **local
        )
        cache = Path(file).parent if file else None
        return cls(str(name_or_path), extract_commit_hash(file, None), cache)

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of the weights; None if they are not local.

        It is read once, because the files may change later. A quantized checkpoint stores the
        fingerprint of its source, so that an adapter fits both.
        """
        if self.folder is None:
            return None
        file = self.folder / CONFIG_FILE
        quantization = read_json(file).get("quantization_config") if file.is_file() else None
        stored = quantization.get("base_fingerprint") if isinstance(quantization, dict) else None
        return stored or fingerprint(self.folder)
