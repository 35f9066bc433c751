"""A checkpoint on disk as single weights, and new checkpoints from them, one file at a time.

open_weights ──► WeightReader ──► one weight at a time ──► write_weights
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from owl2.checkpoints.adapters import find_adapter
from owl2.checkpoints.config_file import CONFIG_FILE, read_config, resolve_checkpoint
from owl2.checkpoints.key_report import check_keys
from owl2.checkpoints.lazy_weights import LazyTensor, WeightReader
from owl2.checkpoints.weight_files import COMPUTED_KEYS, weight_files
from owl2.checkpoints.weight_names import HEAD_WEIGHT, POSITIONS, released_name
from owl2.errors import ErrorCode, InputError
from owl2.files import apply_umask, atomic_write_json
from owl2.model.configuration import Owl2Config
from owl2.model.registry import get_model_type

MAX_SHARD_SIZE = 5 * 10**8  # bytes; a file is in memory twice while it is written
COPIED = (".json", ".model", ".jinja", ".tiktoken", ".txt")  # suffixes of small files
Progress = Callable[[], None]  # called after each weight


def open_weights(model: str | Path) -> tuple[Path, WeightReader, Owl2Config]:
    """The local directory of a checkpoint, its weights, and its configuration.

    Args:
        model: A directory or a hub id with a checkpoint in the released layout.

    Raises:
        InputError: `model` is an adapter, quantized, or does not have the weights of its
            configuration.
    """
    name = resolve_checkpoint(model)
    if find_adapter(name, {}, only_lora=False):
        raise InputError(
            f"{model} is an adapter; run `owl2 merge` first, and use its result",
            ErrorCode.UNSUPPORTED,
        )
    config = read_config(name)  # also reports a missing id, before any weights are downloaded
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{model} is already quantized; use the checkpoint that it was made from",
            ErrorCode.UNSUPPORTED,
        )
    source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
    files = weight_files(source)
    if not files:
        raise InputError(f"{model} has no weights", ErrorCode.MISSING_WEIGHTS)
    reader = WeightReader(files)
    _check_weights(model, reader, config)
    return source, reader, config


def _check_weights(model: str | Path, reader: WeightReader, config: Owl2Config) -> None:
    """Reject a checkpoint whose keys or shapes do not fit the model; reads no values."""
    model_class = get_model_type(config.registry_key).load("model")
    with torch.device("meta"):
        tensors = model_class(config).state_dict()
    expected = {released_name(name): tensor for name, tensor in tensors.items()}
    stored = {released_name(name): tensor for name, tensor in reader.tensors.items()}
    if config.tie_word_embeddings and HEAD_WEIGHT not in stored:
        expected.pop(HEAD_WEIGHT)
    shapes = {
        name: (stored[name].shape, tensor.shape)
        for name, tensor in expected.items()
        # Positions of another image size are resized when the model is loaded.
        if name in stored and name != POSITIONS and not name.endswith(COMPUTED_KEYS)
    }
    missing, unexpected = (
        [name for name in one.keys() - other.keys() if not name.endswith(COMPUTED_KEYS)]
        for one, other in ((expected, stored), (stored, expected))
    )
    check_keys(model, missing, unexpected, shapes)


def copy_small_files(source: Path, directory: Path) -> None:
    """Copy the files of tokenizer and processor, not ``config.json`` and the index of weights."""
    for file in source.iterdir():
        is_small = file.suffix in COPIED and not file.name.endswith(".index.json")
        if file.is_file() and is_small and file.name != CONFIG_FILE:
            shutil.copyfile(file, directory / file.name)
    if (source / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(source / CHAT_TEMPLATE_DIR, directory / CHAT_TEMPLATE_DIR)


def write_weights(
    weights: Mapping[str, LazyTensor],
    directory: Path,
    max_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> None:
    """Write shards of at most `max_size` bytes, or of one tensor, and their index."""
    shards: list[list[str]] = []
    total = 0
    for part in _shards(weights, max_size, progress):
        total += sum(tensor.nbytes for tensor in part.values())
        shards.append(list(part))
        save_file(part, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(names) == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        (directory / f"{i + 1}.safetensors").rename(directory / name)
    if len(names) > 1:
        files = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        atomic_write_json(directory / "model.safetensors.index.json", index)
    apply_umask(directory.glob("*.safetensors"))


def _shards(
    weights: Mapping[str, LazyTensor], max_size: int, progress: Progress | None
) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, lazy in weights.items():
        tensor = lazy[...]
        if part and size + tensor.nbytes > max_size:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
        if progress is not None:
            progress()
    yield part
