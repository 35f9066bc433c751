"""`owl2 export`: a checkpoint for the authors' code (Specification §1.4).

The authors' code has separate weights per modality for all modules of MAM, and one output matrix
that is not tied to the embeddings. A checkpoint without them loads there with random weights, and
without an error. An exported checkpoint contains such weights twice and gives the same logits.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from owl2.checkpoints.config_file import CONFIG_FILE, read_json
from owl2.checkpoints.lazy_weights import LazyTensor, WeightReader
from owl2.checkpoints.load_memory import BUFFERS
from owl2.checkpoints.stored_weights import (
    MAX_SHARD_SIZE,
    Progress,
    copy_small_files,
    open_weights,
    write_weights,
)
from owl2.checkpoints.weight_files import weight_files
from owl2.checkpoints.weight_names import EMBEDDINGS_WEIGHT, HEAD_WEIGHT, released_name
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_directory, atomic_write_json, require_new
from owl2.memory import require_memory
from owl2.model.configuration import Owl2Config

TOKENIZER_FILES = ("tokenizer.model", "qwen.tiktoken")  # one of them is read by the authors' code
OWL2_OPTIONS = ("use_mam", "mam_modules", "image_token_id")  # which only owl2 reads
ROPE_KINDS = ("default", "linear", "dynamic")  # of transformers 4.31


def export_checkpoint(
    model: str | Path,
    output: str | Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> list[str]:
    """Write a checkpoint that the authors' code loads with the same logits.

    The memory is that of the largest weight file, which is memory-mapped, and of one new file.

    Args:
        model: A directory or a hub id with a checkpoint in the released layout.
        output: A directory that does not exist yet.

    Returns:
        Remarks about what else the authors' code needs.

    Raises:
        InputError: `model` is an adapter or quantized, does not have the weights of its
            configuration, or has an option that the authors' code does not have; `output` exists
            or cannot be written.
    """
    require_new(output)
    source, reader, config = open_weights(model)
    if reason := unsupported_reason(config):
        raise InputError(f"{model} cannot be exported: {reason}", ErrorCode.UNSUPPORTED)
    weights = dict(_complete_weights(reader, config))
    largest = max(tensor.nbytes for tensor in reader.tensors.values())
    file_size = max(file.stat().st_size for file in weight_files(source))
    needed = 2 * max(largest, max_shard_size) + BUFFERS
    require_memory(f"Exporting {model}", needed, file_size)
    with atomic_directory(output) as directory:
        write_weights(weights, directory, max_shard_size, progress)
        copy_small_files(source, directory)
        values = read_json(source / CONFIG_FILE)
        atomic_write_json(directory / CONFIG_FILE, exported_config(values, config))
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        return []
    return [
        f"{model} has none of {', '.join(TOKENIZER_FILES)}, from which the authors' code reads its "
        "tokenizer. Convert the tokenizer, or use another one with the same ids there."
    ]


def exported_config(values: dict[str, Any], config: Owl2Config) -> dict[str, Any]:
    """``config.json`` of an exported checkpoint from that of the checkpoint."""
    values = {key: value for key, value in values.items() if key not in OWL2_OPTIONS}
    values |= {"tie_word_embeddings": False, "architectures": [config.authors_architecture]}
    return values | ({"multiway": True} if "multiway" in values else {})


def unsupported_reason(config: Owl2Config) -> str | None:
    """Why the authors' code cannot compute the model, and what to use instead; None if it can."""
    vision = config.visual_config.visual_model
    sizes: Any = config  # the types of LLaMA's configuration include None
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    width = getattr(config, "kv_channels", sizes.hidden_size // sizes.num_attention_heads)
    reasons = {
        f"the authors' code has no grouped-query attention ({sizes.num_key_value_heads} heads for "
        f"keys and values, {sizes.num_attention_heads} for queries). Serve it with owl2, or train "
        "from a language model with as many of both, such as LLaMA-2-7B.": (
            sizes.num_key_value_heads != sizes.num_attention_heads
        ),
        f"the authors' code has attention heads of width {width}, not head_dim {sizes.head_dim}. "
        "Serve it with owl2.": sizes.head_dim != width,
        "the MLP of the authors' code has no bias (mlp_bias). Serve it with owl2.": (
            getattr(config, "mlp_bias", False)
        ),
        f"the authors' code has no rotary embeddings of type {rope}; it has "
        f"{', '.join(ROPE_KINDS)}. Serve it with owl2.": rope not in ROPE_KINDS,
        f"the vision encoder of the authors' code has {config.authors_vision_act}, not "
        f"{vision.hidden_act}. Serve it with owl2.": (
            vision.hidden_act != config.authors_vision_act
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def shared_weights(config: Owl2Config) -> list[str]:
    """What the model shares and the authors' code does not, for people."""
    shared = [name for name in config.mam_module_names if name not in config.separate_modules]
    return shared + (["embeddings and head"] if config.tie_word_embeddings else [])


def _complete_weights(reader: WeightReader, config: Owl2Config) -> Iterator[tuple[str, LazyTensor]]:
    """The weights under the names of released files; shared ones twice."""
    names = "|".join(config.mam_module_names)
    shared = re.compile(rf"((?:model\.layers|transformer\.h)\.\d+\.(?:\w+\.)?(?:{names}))\.(\w+)")
    needs_head = HEAD_WEIGHT not in {released_name(stored) for stored in reader.tensors}
    for stored in reader.tensors:
        tensor = LazyTensor(partial(reader.read_copy, stored))
        name = re.sub(rf"multiway\.([01])\.({names})", r"\2.multiway.\1", stored)
        if found := shared.fullmatch(name):
            for modality in (0, 1):
                yield f"{found[1]}.multiway.{modality}.{found[2]}", tensor
            continue
        yield name, tensor
        if needs_head and released_name(stored) == EMBEDDINGS_WEIGHT:
            yield HEAD_WEIGHT, tensor
