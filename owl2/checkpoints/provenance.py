"""Where a model's weights came from: a place that is found again, and their fingerprint.

The fingerprint tells whether weights are the ones that an adapter was trained on. It is made of the
beginning of every tensor, so it takes a second for any size and changes with every training, yet is
the same in another file format or in other shards.
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

from owl2.checkpoints.weight_files import check_weight_file, load_pickle_weights, weight_files

NUMBERS = 16  # of each tensor
# Of a file that the hub, or its cache here, may not have.
IF_THERE: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
Start = tuple[tuple[int, ...], torch.Tensor]  # a tensor's shape and first numbers
# Computed, not learned: checkpoints may or may not hold them.
COMPUTED = ("_pos_embed", ".inv_freq")


@dataclass(frozen=True)
class Provenance:
    """A local directory, `name` its absolute path, or a repository on the hub at one revision."""

    name: str
    revision: str | None
    folder: Path | None  # with the files; None if the hub's cache has none

    @classmethod
    def of(cls, name_or_path: str | Path, hub: dict[str, Any]) -> "Provenance":
        """Of what transformers has just loaded from there.

        Args:
            hub: where it looked, as `from_pretrained` (``subfolder``, ``revision`` ...).
        """
        if Path(name_or_path).is_dir():
            # Absolute, to be found from another working directory, too.
            folder = os.path.abspath(Path(name_or_path) / (hub.get("subfolder") or ""))
            return cls(folder, None, Path(folder))
        fetched = hub | {"local_files_only": True, "force_download": False}
        file = cached_file(str(name_or_path), "config.json", **fetched, **IF_THERE)
        folder_there = Path(file).parent if file else None
        return cls(str(name_or_path), extract_commit_hash(file, None), folder_there)

    @cached_property
    def fingerprint(self) -> str | None:
        """Of the weights; None if they are not here. Read once: what is there later may differ."""
        return fingerprint(self.folder) if self.folder else None


def fingerprint(folder: Path) -> str | None:
    """Of the weights in a local directory; None if there are none.

    Raises:
        InputError: a file that is no weights.
    """
    digest = hashlib.sha256()
    starts: dict[str, Start] = {}
    for file in weight_files(folder):
        starts |= dict(_starts(file))
    for name in sorted(starts):
        shape, numbers = starts[name]
        digest.update(f"{name} {shape}\n".encode())
        # float32 holds every 16-bit number exactly, and NumPy has no bfloat16.
        digest.update(numbers.to(torch.float32).numpy().tobytes())
    return digest.hexdigest() if starts else None


def _starts(file: Path) -> Iterator[tuple[str, Start]]:
    """The learned tensors' starts, by name."""
    if file.suffix != ".safetensors":
        for name, tensor in load_pickle_weights(file, place="cpu").items():
            if not name.endswith(COMPUTED):
                yield name, (tuple(tensor.shape), _start(tensor))
        return
    check_weight_file(file)
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # no dict
            if not name.endswith(COMPUTED):
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                start = part[:1] if shape else opened.get_tensor(name)
                if len(shape) == 1:
                    start = part[:NUMBERS]
                yield name, (shape, _start(start))


def _start(tensor: torch.Tensor) -> torch.Tensor:
    # Row by row down to a vector: flattening a tensor of a mapped file could read all of it.
    while tensor.dim() > 1:
        tensor = tensor[0]
    return tensor.flatten()[:NUMBERS].clone()
