"""`owl2 quantize`: a quantized checkpoint from a checkpoint, one weight at a time.

    weight files ──► one weight ──► 4 or 8 bits ──► model-00001-of-0000N.safetensors, ...
    config.json  ──► with ``quantization_config``
    tokenizer, processor, generation_config.json ──► copies

The memory is that of the largest weight file, which is memory-mapped, and of one new file.
The format is described in docs/reference/quantized-checkpoints.md.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from owl2.checkpoints.adapters import find_adapter
from owl2.checkpoints.config_file import CONFIG_FILE, read_config, read_json, resolve_checkpoint
from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig
from owl2.checkpoints.key_report import check_keys
from owl2.checkpoints.lazy_weights import LazyTensor, WeightReader
from owl2.checkpoints.load import HEAD, POSITIONS
from owl2.checkpoints.load_memory import BUFFERS, loaded_size
from owl2.checkpoints.quantized_weights import QuantizeWeight, quantized_weights, round_to_nearest
from owl2.checkpoints.weight_files import COMPUTED_KEYS, fingerprint, weight_files
from owl2.checkpoints.weight_names import released_name
from owl2.errors import ErrorCode, InputError
from owl2.files import apply_umask, atomic_directory, require_writable
from owl2.memory import require_memory
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration

MAX_SHARD_SIZE = 5 * 10**8  # bytes; a file is in memory twice while it is written
COPIED = (".json", ".model", ".jinja", ".txt")  # suffixes of small files
Progress = Callable[[int, int], None]  # weights that are done, all weights


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    config: Owl2QuantizationConfig | None = None,
    quantize_weight: QuantizeWeight = round_to_nearest,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> Path:
    """Write a quantized checkpoint, which `from_pretrained` loads.

    Args:
        model: A directory or a hub id with a checkpoint in the released layout.
        output: A directory that does not exist yet.
        config: The bits; default: 4.
        quantize_weight: Quantizes a weight; default: rounds to the nearest value.

    Returns:
        `output`.

    Raises:
        InputError: `model` is an adapter, already quantized, or does not have the weights of its
            configuration; `output` exists or cannot be written.
    """
    source, reader, config = open_checkpoint(model, config or Owl2QuantizationConfig())
    if Path(output).exists():
        raise InputError(f"{output} exists; choose another output", ErrorCode.FILE_EXISTS)
    require_writable(output)
    needed = quantization_memory(reader.tensors, config, max_shard_size)
    file_size = max(file.stat().st_size for file in weight_files(source))
    require_memory(f"Quantizing {model}", needed, file_size)
    weights = quantized_weights(reader, config, quantize_weight)
    with atomic_directory(output) as directory:
        _write_weights(weights, directory, max_shard_size, progress)
        for file in source.iterdir():
            is_small = file.suffix in COPIED and not file.name.endswith(".index.json")
            if file.is_file() and is_small and file.name != CONFIG_FILE:
                shutil.copyfile(file, directory / file.name)
        values = read_json(source / CONFIG_FILE)
        values.pop("auto_map", None)  # the authors' code cannot read the weights
        values |= {"tie_word_embeddings": False, "quantization_config": config.to_dict()}
        text = json.dumps(values, indent=2) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    return Path(output)


def quantization_memory(
    tensors: Mapping[str, torch.Tensor],
    config: Owl2QuantizationConfig,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> int:
    """The bytes that `quantize_checkpoint` needs when it rounds to nearest.

    The largest weight file is mapped in addition.

    Args:
        tensors: The stored tensors by name, on the meta device.
    """
    largest = max(tensor.nbytes for tensor in tensors.values())
    return 2 * min(max_shard_size, loaded_size(tensors, None, config)) + largest + BUFFERS


def open_checkpoint(
    model: str | Path, config: Owl2QuantizationConfig
) -> tuple[Path, WeightReader, Owl2QuantizationConfig]:
    """The local directory of a checkpoint, its weights, and `config` with its fingerprint.

    Raises:
        InputError: See `quantize_checkpoint`.
    """
    name = resolve_checkpoint(model)
    if find_adapter(name, {}, only_lora=False):
        raise InputError(
            f"{model} is an adapter; run `owl2 merge` first, and quantize its result",
            ErrorCode.UNSUPPORTED,
        )
    source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
    model_config = read_config(source)
    if getattr(model_config, "quantization_config", None):
        raise InputError(f"{model} is already quantized", ErrorCode.UNSUPPORTED)
    files = weight_files(source)
    if not files:
        raise InputError(f"{model} has no weights", ErrorCode.MISSING_WEIGHTS)
    reader = WeightReader(files)
    _check_weights(model, reader, model_config)
    config.base_fingerprint = fingerprint(source)
    return source, reader, config


def _check_weights(model: str | Path, reader: WeightReader, config: Owl2Config) -> None:
    """Reject a checkpoint with other keys or shapes than the model's; reads no values."""
    with torch.device("meta"):
        expected = {
            released_name(name): tensor
            for name, tensor in Owl2ForConditionalGeneration(config).state_dict().items()
        }
    stored = {released_name(name): tensor for name, tensor in reader.tensors.items()}
    if config.tie_word_embeddings and HEAD not in stored:
        expected.pop(HEAD)
    shapes = {
        name: (tuple(stored[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        # Positions of another image size are resized when the model is loaded.
        if name in stored and name != POSITIONS and not name.endswith(COMPUTED_KEYS)
        if stored[name].shape != tensor.shape
    }
    missing, unexpected = (
        [name for name in one.keys() - other.keys() if not name.endswith(COMPUTED_KEYS)]
        for one, other in ((expected, stored), (stored, expected))
    )
    check_keys(model, missing, unexpected, shapes)


def _write_weights(
    weights: dict[str, LazyTensor], directory: Path, max_size: int, progress: Progress | None
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
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    apply_umask(directory.glob("*.safetensors"))


def _shards(
    weights: dict[str, LazyTensor], max_size: int, progress: Progress | None
) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for done, (name, lazy) in enumerate(weights.items(), 1):
        tensor = lazy[...]
        if part and size + tensor.nbytes > max_size:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
        if progress is not None:
            progress(done, len(weights))
    yield part
