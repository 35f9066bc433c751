"""Digests that distinguish two evaluations: of the weights, the data and the versions."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from owl2 import __version__
from owl2.checkpoints.weight_names import released_name
from owl2.eval.samples import EvalSample, Response
from owl2.processing.messages import parse_messages
from owl2.runtime import package_versions

PACKAGES = ("torch", "transformers", "pillow", "lm-eval", "lmms-eval", "pycocoevalcap")
VALUES_PER_TENSOR = 256  # a training step changes all values of a weight


def model_fingerprint(model: nn.Module) -> str:
    """Digest of names, shapes, dtypes and evenly spaced values of all weights; seconds for 7 B."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{released_name(name)} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // VALUES_PER_TENSOR)].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def samples_fingerprint(samples: Iterable[EvalSample]) -> str:
    """Digest of questions and expected answers, without images."""
    digest = hashlib.sha256()
    for sample in samples:
        row = [sample.id, sample.question, sample.expected, sample.category, sample.metadata]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def images_fingerprint(responses: Iterable[Response]) -> str:
    """Digest of the images of all responses, in order."""
    lines = (" ".join(response.image_digests) for response in responses)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_digest(source: Any) -> str:
    """Digest of an image as `load_image` takes it: of its bytes, or of its URL."""
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        return file_digest(Path(source))[:32]
    if isinstance(source, Image.Image):
        source = repr((source.mode, source.size)).encode() + source.tobytes()
    if not isinstance(source, bytes):
        source = str(source).encode("utf-8", errors="surrogatepass")
    return hashlib.sha256(source).hexdigest()[:32]


def image_digests(sample: EvalSample) -> list[str]:
    """The digests of the images of a sample, in order."""
    return [image_digest(image) for image in parse_messages(sample.messages).images]


def cache_key(sample: EvalSample) -> str:
    """Digest of everything in a sample that determines the response.

    An image file is represented by its path, size and modification time.
    """
    contents = [turn["content"] for turn in sample.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    paths = [path for part in parts if os.path.isfile(path := str(part.get("path", "")))]
    files = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    row = [sample.id, sample.question, sample.messages, files, sample.metadata, sample.expected]
    text = json.dumps(row, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:32]


@cache
def versions() -> dict[str, str]:
    """The versions of owl2, Python and the installed packages that may change a score."""
    return {"owl2": __version__, **package_versions(*PACKAGES)}
