"""Create the checkpoint that stage 1 starts from (`owl2 init`).

    LLaMA (directory, hub id, .gguf, or fresh) ─┐
    CLIP tower (directory, hub id, or fresh) ───┴─► untrained Owl2 + Owl2Processor ──► OUTPUT

The sizes of a fresh (randomly initialized) part come from a YAML file with the sections `llm`,
`vision`, `abstractor` (names as in `config.json`) and `tokenizer` (``dataset`` or ``file``,
``vocab_size``): a fresh language model gets a SentencePiece tokenizer trained on the text of a
dataset's train split, or of a file of training rows.
"""

import json
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file

from owl2.checkpoints.config_file import resolve_checkpoint
from owl2.checkpoints.from_backbones import load_llm, load_vision, random_llm
from owl2.data.open_dataset import open_dataset
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.files import atomic_directory, expand_user, require_new
from owl2.model.configuration import Owl2AbstractorConfig, Owl2VisionConfig
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import TOKENIZER_FILE, Owl2Tokenizer, train_tokenizer
from owl2.registry import look_up
from owl2.runtime import DTYPES
from owl2.train.recipe_file import read_yaml

FRESH = "fresh"
# A chat template must support this conversation.
PROBE = [
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
]
SECTIONS: dict[str, Any] = {
    "llm": {field.name for field in fields(LlamaConfig)} | {"rope_theta"},
    "vision": {field.name for field in fields(Owl2VisionConfig)},
    "abstractor": {field.name for field in fields(Owl2AbstractorConfig)},
    "tokenizer": {"dataset", "file", "vocab_size"},
}


def init_checkpoint(
    llm: str,
    vision: str,
    output: str | Path,
    *,
    config: str | Path | None = None,
    image_size: int | None = None,
    use_mam: bool = True,
    mam_modules: list[str] | None = None,
    chat_template: str | Path | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Owl2ForConditionalGeneration:
    """Create an untrained mPLUG-Owl2 and write it to `output`.

    Args:
        llm: A LLaMA: a directory, a hub id, a ``.gguf`` file, or "fresh".
        vision: A CLIP tower: a directory, a hub id, or "fresh".
        config: A YAML file with the sizes of fresh parts (see above); default: the paper's.
        image_size: Pixels per edge; default: that of the tower or the config.
        use_mam: False for the paper's ablation without the modality-adaptive module.
        mam_modules: The modules with separate weights per modality, see `Owl2Config`.
        chat_template: A Jinja file instead of the paper's format; it marks the text with a loss by
            ``{% generation %}``.
        dtype: Of the weights, e.g. "bfloat16"; "auto": that of the language model.
        seed: Of the random initialization.

    Raises:
        InputError: Parts that cannot be read or do not fit together, or unknown settings.
    """
    require_new(output)
    settings = _read_config(config, {"llm": llm, "tokenizer": llm, "vision": vision})
    llm, vision = _resolve_backbone(llm), _resolve_backbone(vision)
    try:
        template = None if chat_template is None else Path(chat_template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the chat template {chat_template} cannot be read: {error}", ErrorCode.UNREADABLE_FILE
        ) from error
    weights_dtype = None if dtype == "auto" else look_up("dtype", dtype, DTYPES)
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerBase
    with TemporaryDirectory() as scratch:
        if llm == FRESH:
            tokenizer = _fresh_tokenizer(settings["tokenizer"], Path(scratch) / TOKENIZER_FILE)
            defaults = {
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "rms_norm_eps": 1e-5,
            }
            language_model = random_llm(**defaults | settings["llm"])
        else:
            language_model = load_llm(llm, weights_dtype or "auto")
            tokenizer = load_tokenizer(llm)
        model = Owl2ForConditionalGeneration.from_backbones(
            language_model,
            settings["vision"] if vision == FRESH else load_vision(vision),
            abstractor=settings["abstractor"],
            image_size=image_size,
            use_mam=use_mam,
            mam_modules=mam_modules,
        )
        if weights_dtype is not None:
            model.to(weights_dtype)
        tokenizer = _without_padding_token(tokenizer, model.config.vocab_size)
        processor = _make_processor(model, tokenizer, template)
        with atomic_directory(output) as directory:
            model.save_pretrained(directory)
            processor.save_pretrained(directory)
    return model


def _resolve_backbone(source: str | Path) -> str:
    is_file = Path(source).suffix == ".gguf"
    if is_file or source == FRESH:
        return str(expand_user(source))
    return resolve_checkpoint(source, "a backbone")


def load_tokenizer(llm: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model: `Owl2Tokenizer` for SentencePiece, else transformers'.

    Raises:
        InputError: No readable tokenizer.
    """
    path = Path(llm)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        file = cached_file(str(llm), TOKENIZER_FILE, _raise_exceptions_for_missing_entries=False)
        tokenizer_class = AutoTokenizer if file is None else Owl2Tokenizer
        return tokenizer_class.from_pretrained(str(llm))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{llm} has no readable tokenizer: {error}", ErrorCode.UNREADABLE_FILE
        ) from error


def _without_padding_token(
    tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> PreTrainedTokenizerBase:
    """The tokenizer without added padding tokens that have no row in the embedding.

    Many copies of LLaMA-2 have such a `<pad>`. The model never receives it: padding is masked.
    """
    added = [token for token, id_ in tokenizer.get_added_vocab().items() if id_ >= num_rows]
    has_others = any("pad" not in token.lower() for token in added)
    if not added or has_others or len(tokenizer) - len(added) > num_rows:
        return tokenizer
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    if isinstance(tokenizer, Owl2Tokenizer):
        legacy = tokenizer.adds_prefix_after_control
        return Owl2Tokenizer(str(tokenizer.vocab_file), **names, legacy=legacy)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < num_rows]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _make_processor(
    model: Owl2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Owl2Processor:
    config = model.config
    if (size := len(tokenizer.get_vocab().keys() - {IMAGE_TOKEN})) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {size} tokens, but the language model has "
            f"{config.vocab_size}: use the tokenizer of this language model",
            ErrorCode.SHAPE_MISMATCH,
        )
    processor = Owl2Processor(
        Owl2ImageProcessor(config.image_size),
        tokenizer,
        template,
        num_image_tokens=config.num_image_tokens,
    )
    config.image_token_id = processor.image_token_id  # the LLaMA may have more rows than tokens
    with error_prefix("invalid chat template: "):
        processor.apply_chat_template(PROBE, add_generation_prompt=True)
    return processor


def _read_config(path: str | Path | None, origins: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The sections of the file; `origins`: of the parts, because only a fresh part has settings."""
    content = {} if path is None else read_yaml(Path(path))
    for section, settings in content.items():
        known = look_up(f"section of {path}", section, SECTIONS)
        if not isinstance(settings, dict):
            raise InputError(
                f"{path}: `{section}` must contain `name: value` lines", ErrorCode.INVALID_TYPE
            )
        for name in settings:
            look_up(f"setting of `{section}` in {path}", name, dict.fromkeys(known))
        if settings and origins.get(section, FRESH) != FRESH:
            raise InputError(
                f"{path}: `{section}` is for a fresh part, but the part comes from "
                f"{origins[section]}: remove the section",
                ErrorCode.CONFLICT,
            )
    return {section: content.get(section, {}) for section in SECTIONS}


def _fresh_tokenizer(settings: dict[str, Any], file: Path) -> Owl2Tokenizer:
    """A tokenizer trained on the distinct texts of the turns in a dataset's train split."""
    origin = {key: settings[key] for key in ("dataset", "file") if key in settings}
    size = settings.get("vocab_size")
    names = list(origin.values())
    if len(names) != 1 or not isinstance(names[0], str) or not isinstance(size, int):
        raise InputError(
            "a fresh language model needs `tokenizer` in --config, with the name of a `dataset` "
            "or a `file` of training rows, and `vocab_size`, the size of the vocabulary",
            ErrorCode.MISSING_VALUE,
        )
    texts: dict[str, None] = {}  # in their order
    samples: Any = open_dataset(**origin)  # not shards
    for sample in samples:
        for message in sample.messages:
            content = message["content"]
            for part in [{"text": content}] if isinstance(content, str) else content:
                if "text" in part:
                    texts[f"{message['role'].upper()}: {part['text']}"] = None
    train_tokenizer(list(texts), file, size)
    return Owl2Tokenizer(file)
