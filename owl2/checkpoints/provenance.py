"""Where the weights of a model come from: a directory or hub revision, and a fingerprint.

The fingerprint shows whether weights are the ones that an adapter was trained on. It is a hash of
the first values of every tensor. It takes about a second for any size, changes with every training,
and does not depend on the file format or the shards.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file, extract_commit_hash

from owl2.checkpoints.weight_files import (
    OPTIONAL_FILE,
    load_pickle_weights,
    read_header,
    weight_files,
)

VALUES_PER_TENSOR = 16
# Computed, not learned: checkpoints may or may not contain these.
COMPUTED_KEYS = ("_pos_embed", ".inv_freq")


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
        file = cached_file(str(name_or_path), "config.json", **local, **OPTIONAL_FILE)
        cache = Path(file).parent if file else None
        return cls(str(name_or_path), extract_commit_hash(file, None), cache)

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of the weights; None if they are not local.

        It is read once, because the files may change later.
        """
        return fingerprint(self.folder) if self.folder else None


def fingerprint(folder: Path) -> str | None:
    """Fingerprint of the weights in a local directory; None if it has no weights.

    Raises:
        InputError: A file does not contain weights.
    """
    digest = hashlib.sha256()
    tensors = {name: start for file in weight_files(folder) for name, start in _read_starts(file)}
    for name, (shape, values) in sorted(tensors.items()):
        digest.update(f"{name} {shape}\n".encode())
        # float32 represents every 16-bit float exactly, and NumPy has no bfloat16.
        digest.update(values.to(torch.float32).numpy().tobytes())
    return digest.hexdigest() if tensors else None


def _read_starts(file: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.Tensor]]]:
    """Name, shape and first values of each learned tensor."""
    if file.suffix != ".safetensors":
        for name, tensor in load_pickle_weights(file, device="cpu").items():
            if not name.endswith(COMPUTED_KEYS):
                yield name, (tuple(tensor.shape), _start(tensor))
        return
    headers = read_header(file)
    with safe_open(file, framework="pt") as opened:
        for name, header in headers.items():
            if name.endswith(COMPUTED_KEYS):
                continue
            rows = VALUES_PER_TENSOR if len(header.shape) == 1 else 1
            part = opened.get_slice(name)[:rows] if header.shape else opened.get_tensor(name)
            yield name, (header.shape, _start(part))


def _start(tensor: torch.Tensor) -> torch.Tensor:
    # By rows down to a vector: flattening a memory-mapped tensor could read all of it.
    while tensor.dim() > 1:
        tensor = tensor[0]
    return tensor.flatten()[:VALUES_PER_TENSOR].clone()
