"""What tells two evaluations apart: the model's weights, the data, the versions."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from owl2 import __version__
from owl2.eval.samples import Question

PACKAGES = ("torch", "transformers", "pillow", "lm-eval", "lmms-eval", "pycocoevalcap")
PER_TENSOR = 256  # numbers of each weight that are looked at: a training step changes them all


def model_fingerprint(model: nn.Module) -> str:
    """Of names, shapes, dtypes and evenly spread numbers of all weights; seconds for 7 B."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // PER_TENSOR)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def questions_fingerprint(questions: Iterable[Question]) -> str:
    """Of what is asked and what is expected; without the images."""
    digest = hashlib.sha256()
    for question in questions:
        row = [question.id, question.text, question.expected, question.kind, question.facts]
        text = json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def images_fingerprint(digests: Iterable[Sequence[str]]) -> str:
    """Of the images' own, in the order of the questions."""
    return hashlib.sha256("\n".join(" ".join(own) for own in digests).encode()).hexdigest()


def image_fingerprint(source: Any) -> str:
    """Of an image as `owl2.processing.image_io.load_image` takes it: of its bytes where they are
    here, else of its name."""
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        return file_fingerprint(Path(source))[:32]
    if isinstance(source, Image.Image):
        source = repr((source.mode, source.size)).encode() + source.tobytes()
    if not isinstance(source, bytes):
        source = str(source).encode("utf-8", errors="surrogatepass")
    return hashlib.sha256(source).hexdigest()[:32]


@cache
def versions() -> dict[str, str]:
    """Ours, Python's, and those of the packages that a score may depend on and that are here."""
    found = {"owl2": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra
    return found
