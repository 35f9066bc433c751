"""The processor's files in a checkpoint: search and validation.

The files come from any source, so every problem is an `InputError` with the file and the key.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import TextKwargs

from owl2.checkpoints.adapters import base_name
from owl2.checkpoints.config_file import (
    CONFIG_FILE,
    HUB_ARGS,
    find_file,
    read_config,
    read_json,
    resolve_checkpoint,
)
from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.model.registry import DEFAULT_MODEL_TYPE, MODEL_TYPES, ModelType, get_model_type
from owl2.processing.default_templates import CHAT_TEMPLATES
from owl2.processing.image_processing import Owl2ImageProcessor, Owl2ImageProcessorKwargs
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.tokenizer import TOKENIZER_CONFIG_FILE, encode
from owl2.processing.video import DEFAULT_NUM_FRAMES

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# config.json first: every checkpoint has it, so it shows whether the checkpoint exists.
_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, TOKENIZER_CONFIG_FILE)
# Only the released checkpoint has shards with this name (Specification §1.4).
_INDEX_FILE, _RELEASED_SHARD = "pytorch_model.bin.index.json", "pytorch_model-1-of-33.bin"
# Each of these makes a tokenizer. From tokenizer_config.json alone, transformers would create an
# empty tokenizer.
_VOCABULARIES = (
    *sorted({(parts.vocabulary_file,) for parts in MODEL_TYPES.values()}),
    *(("tokenizer.json",), ("vocab.json", "merges.txt")),
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Added by AutoProcessor and pipelines, and arguments of transformers without effect.
_IGNORED = frozenset(
    ("_commit_hash", "_from_auto", "_from_pipeline", "code_revision", "dtype", "trust_remote_code")
) | {"use_fast", "backend", "device_map", "torch_dtype", "attn_implementation"}
_TOKENIZER_ARGS = {
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    *TextKwargs.__annotations__,
    *("extra_special_tokens", "legacy", "add_bos_token", "truncation_side", "model_max_length"),
    *("clean_up_tokenization_spaces", "split_special_tokens", "tokenizer_type"),
}

# The class that wrote a file; old files have the last one.
_CLASS_KEYS = ("processor_class", "image_processor_type", "feature_extractor_type")

Files = dict[str, Path | None]


def read_processor(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Owl2Processor` for a checkpoint, a directory or a hub id.

    Args:
        args: Of the hub, the image processor and the tokenizer; `base`, the base model of an
            adapter, which has the files of adapters without a tokenizer.

    Raises:
        InputError: A file is missing or invalid, or config.json is of another model.
        TypeError: An unknown argument.
    """
    hub = {key: args[key] for key in args.keys() & {*HUB_ARGS, "proxies"}}
    name, files = _find_files(name, args.pop("base", None), hub)
    config = read_config(name, **hub) if files[CONFIG_FILE] else None
    model_type = _find_model_type(name, config, files[PROCESSOR_FILE], hub)
    files |= _find_vocabulary(name, files, hub, model_type)
    pixel_args, tokenizer_args = _split_arguments(args, model_type)
    _check_classes(files)
    is_padded = _follows_config(name, config, hub)
    pixels = _image_options(files[PREPROCESSOR_FILE], config, model_type, is_padded)
    image_processor = model_type.load("image_processor").from_dict(pixels)
    tokenizer_args = {"padding_side": "left"} | tokenizer_args  # for generation
    tokenizer = _load_tokenizer(name, files, hub | tokenizer_args, model_type)
    template = tokenizer.chat_template  # transformers reads chat_template.jinja
    if template is None and (old := find_file(name, "chat_template.json", hub)):
        template = read_json(old).get("chat_template")
    return {
        "image_processor": image_processor.replace(**pixel_args),
        "tokenizer": tokenizer,
        "chat_template": template or CHAT_TEMPLATES[model_type.chat_template],
        **_processor_options(files[PROCESSOR_FILE], config, model_type, tokenizer, is_padded),
    }


def _find_files(name: str, base: str | None, hub: dict[str, Any]) -> tuple[str, Files]:
    """The checkpoint with the processor, and its `_FILES`: `name`, or the base of this adapter."""
    name = resolve_checkpoint(name, "a processor", False, hub.get("revision"))
    files = {file: find_file(name, file, hub) for file in _FILES}
    has_vocabulary = any(find_file(name, vocabulary[0], hub) for vocabulary in _VOCABULARIES)
    if not has_vocabulary and (own_base := base or base_name(name, hub)):
        name = resolve_checkpoint(own_base, "a processor", False)
        files = {file: find_file(name, file, hub) for file in _FILES}
    return name, files


def _split_arguments(
    args: dict[str, Any], model_type: ModelType
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the image processor and of the tokenizer.

    Raises:
        InputError: The image processor has no image policy.
        TypeError: An unknown argument.
    """
    image_processor_class = model_type.load("image_processor")
    if args.get("image_policy") is not None and image_processor_class.makes_crops:
        raise InputError(
            f"{model_type.title} cuts pages into crops and has no image policy "
            f"({args['image_policy']!r}). Omit it; the options of crops are anchors, "
            "add_global_img and add_textual_crop_indicator.",
            ErrorCode.CONFLICT,
        )
    kinds = (image_processor_class.valid_kwargs, Owl2ImageProcessorKwargs)
    names = {name for kind in kinds for name in kind.__annotations__}
    known = _IGNORED | names | _TOKENIZER_ARGS | {*HUB_ARGS, "proxies"}
    if unknown := sorted(args.keys() - known):
        raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(unknown)}")
    pixel_args = {key: args[key] for key in args.keys() & names}
    return pixel_args, {key: args[key] for key in args.keys() & _TOKENIZER_ARGS}


def _check_classes(files: Files) -> None:
    """Raise an InputError if another processor wrote the files."""
    for path in filter(None, (files[PREPROCESSOR_FILE], files[PROCESSOR_FILE])):
        for key, value in read_json(path).items():
            if key in _CLASS_KEYS and not str(value).startswith(("Owl2", "CLIP")):
                raise InputError(
                    f"{path} belongs to a {value}, not to an mPLUG-Owl2.", ErrorCode.UNSUPPORTED
                )


def _image_options(
    file: Path | None, config: Owl2Config | None, model_type: ModelType, is_padded: bool
) -> dict[str, Any]:
    """The options of the image processor in ``preprocessor_config.json``.

    Without the file, all but the size have their default (Specification §1.5).
    """
    pixels = {"size": config.image_size if config else None}
    if file:
        pixels = read_json(file)
    policy, _ = select_image_policy(pixels, config, is_padded)
    return model_type.image_options | pixels | {"image_policy": policy}


def _processor_options(
    file: Path | None,
    config: Owl2Config | None,
    model_type: ModelType,
    tokenizer: PreTrainedTokenizerBase,
    is_padded: bool,
) -> dict[str, Any]:
    """The options of `Owl2Processor` itself in ``processor_config.json``.

    Raises:
        InputError: A value has another type.
    """
    stored = read_json(file) if file else {}
    # The tokenizer has the image token, unless it was written by the authors or an early owl2.
    token_id = tokenizer.added_tokens_encoder.get(IMAGE_TOKEN, len(tokenizer))
    sizes = {
        "num_image_tokens": stored.get("num_image_tokens", 65),
        "image_token_id": stored.get("image_token_id", token_id),
        "num_frames": stored.get("num_frames", DEFAULT_NUM_FRAMES),
    }
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"{file}: {key} is {value!r}; it must be an integer of at least 1.",
                ErrorCode.INVALID_CONFIG,
            )
    rules = {
        "image_newline": stored.get("image_newline", False),
        "interleave_images": stored.get(
            "interleave_images", model_type.interleave_images or is_padded
        ),
    }
    for key, rule in rules.items():
        if not isinstance(rule, bool):
            raise InputError(
                f"{file}: {key} is {rule!r}; it must be true or false.", ErrorCode.INVALID_CONFIG
            )
    if config:  # It has precedence, because the ids must fit the model.
        sizes["num_image_tokens"] = config.num_image_tokens
        sizes["image_token_id"] = max(config.image_token_id, token_id)
    return sizes | rules


def _find_model_type(
    name: str, config: Owl2Config | None, processor_file: Path | None, hub: dict[str, Any]
) -> ModelType:
    """The model type of a checkpoint.

    Of a processor that was saved without its model: the first one with its image processor and its
    vocabulary.
    """
    if config:
        return get_model_type(config.registry_key)
    saved = read_json(processor_file).get("image_processor") if processor_file else None
    saved_class = saved.get("image_processor_type") if isinstance(saved, dict) else None
    for parts in MODEL_TYPES.values():
        has_class = saved_class in (None, parts.image_processor.split(":")[1])
        if has_class and find_file(name, parts.vocabulary_file, hub):
            return parts
    return get_model_type(DEFAULT_MODEL_TYPE)


def select_image_policy(
    pixels: Mapping[str, Any], config: Owl2Config | None, is_padded: bool
) -> tuple[str, str]:
    """The image policy of a checkpoint and the reason; an explicit option has precedence.

    Args:
        pixels: The content of ``preprocessor_config.json``; {} without the file.
        is_padded: Whether ``config.json`` selects "pad", see `_follows_config`.
    """
    if "image_policy" in pixels:
        return str(pixels["image_policy"]), f"image_policy in {PREPROCESSOR_FILE}"
    if is_padded:
        return "pad", f"image_aspect_ratio in {CONFIG_FILE}"
    name = config.registry_key if config else DEFAULT_MODEL_TYPE
    return get_model_type(name).image_policy, f"default of {name}"


def _follows_config(name: str | Path, config: Owl2Config | None, hub: dict[str, Any]) -> bool:
    """Whether ``image_aspect_ratio`` in ``config.json`` is "pad" and applies to inference.

    It does for the models that descend from mPLUG-Owl2: OneAlign, Co-Instruct, Compare2Score, ...
    Their prompts have images inside the text. The authors' inference of mPLUG-Owl2 itself stretches
    images whatever the file says (Specification §1.5).
    """
    if getattr(config, "image_aspect_ratio", None) != "pad":
        return False
    index = find_file(name, _INDEX_FILE, hub)
    shards = read_json(index).get("weight_map") if index else None
    return not isinstance(shards, dict) or _RELEASED_SHARD not in shards.values()


def read_image_policy(name: str | Path, config: Owl2Config) -> tuple[str, str]:
    """`select_image_policy` for a checkpoint, a directory or a hub id."""
    name = resolve_checkpoint(name, weights=False)
    file = find_file(name, PREPROCESSOR_FILE, {})
    is_padded = _follows_config(name, config, {})
    return select_image_policy(read_json(file) if file else {}, config, is_padded)


def _find_vocabulary(name: str, files: Files, hub: dict[str, Any], model_type: ModelType) -> Files:
    """The files of the first vocabulary in a checkpoint, but not those of other model types."""
    found: Files = {}
    foreign = {parts.vocabulary_file for parts in MODEL_TYPES.values()}
    foreign -= {model_type.vocabulary_file}
    choices = [vocabulary for vocabulary in _VOCABULARIES if vocabulary[0] not in foreign]
    for vocabulary in choices:
        found |= {file: find_file(name, file, hub) for file in vocabulary}
        if has_vocabulary := all(found[file] for file in vocabulary):
            break
    missing = []
    if not has_vocabulary:
        missing.append(f"a tokenizer ({' or '.join(map(' and '.join, choices))})")
    if files[PREPROCESSOR_FILE] is None and files[CONFIG_FILE] is None:
        missing.append(f"the image settings ({PREPROCESSOR_FILE})")
    if missing:
        place = "" if Path(name).is_dir() else " on the hub or in its cache"
        raise InputError(
            f"'{name}'{place} does not contain a processor: {' and '.join(missing)} missing. Copy "
            "the files of the original checkpoint, or create them with `owl2 init`.",
            ErrorCode.FILE_NOT_FOUND,
        )
    return found


def _load_tokenizer(
    name: str, files: Files, hub: dict[str, Any], model_type: ModelType
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: It cannot be loaded, or its vocabulary is empty.
    """
    file = TOKENIZER_CONFIG_FILE
    path = files[file]
    for key, value in (read_json(path) if path else {}).items():
        if key in _SPECIAL_TOKENS and not isinstance(value, (str, dict, type(None))):
            raise InputError(
                f"{path}: {key} is {value!r}; it must be a string.", ErrorCode.INVALID_CONFIG
            )
    has_own = files[model_type.vocabulary_file] is not None
    loader = model_type.load("tokenizer") if has_own else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(name, **hub)
        is_empty = not encode(tokenizer, "x")
    except InputError:
        raise
    except Exception as error:  # the loader raises exceptions of any type for corrupt files
        raise InputError(
            f"The tokenizer of '{name}' cannot be loaded: {type(error).__name__}: {error}. Its "
            f"files ({file}, {TEMPLATE_FILE}, ...) may be corrupt: copy them again.",
            ErrorCode.UNREADABLE_FILE,
        ) from error
    if is_empty:
        raise InputError(
            f"The tokenizer of '{name}' has no tokens for the text 'x': its vocabulary is missing "
            "or empty. Copy the files of the tokenizer again.",
            ErrorCode.UNREADABLE_FILE,
        )
    return tokenizer


def write_image_options(image_processor: Owl2ImageProcessor, directory: Path) -> None:
    """Write ``preprocessor_config.json``, which other programs read."""
    pixels = image_processor.to_dict() | {"image_processor_type": "CLIPImageProcessor"}
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(pixels, indent=2, sort_keys=True) + "\n"
    (directory / PREPROCESSOR_FILE).write_text(text)
