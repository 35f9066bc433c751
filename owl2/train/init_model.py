"""The checkpoint that stage 1 starts from: parts put together, with their processor.

    LLaMA (directory, hub id, .gguf, or fresh) ─┐
    CLIP tower (directory, hub id, or fresh) ───┴─► untrained Owl2 + Owl2Processor ──► OUTPUT

What is fresh has the sizes of a YAML file with the sections `llm`, `vision`, `abstractor` (names as
in `config.json`) and `tokenizer` (``dataset``, ``vocab_size``): a fresh language model gets a
SentencePiece tokenizer trained on the words of a dataset's training split.
"""

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from owl2.checkpoints.from_backbones import load_llm, load_vision, random_llm
from owl2.data.datasets import load_dataset
from owl2.errors import InputError
from owl2.files import atomic_directory, require_writable
from owl2.model.configuration import Owl2AbstractorConfig, Owl2VisionConfig
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import TOKENIZER_FILE, Owl2Tokenizer, train_tokenizer
from owl2.registry import look_up
from owl2.train.recipe_file import read_yaml

FRESH = "fresh"
# What a chat template must be able to write, or the checkpoint could not be asked anything.
PROBE = [
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    {"role": "user", "content": [{"type": "text", "text": "c"}]},
]
TOKENIZER_SETTINGS = {"dataset": str, "vocab_size": int}
SECTIONS: dict[str, Any] = {
    "llm": {field.name for field in fields(LlamaConfig)} | {"rope_theta"},
    "vision": {field.name for field in fields(Owl2VisionConfig)},
    "abstractor": {field.name for field in fields(Owl2AbstractorConfig)},
    "tokenizer": set(TOKENIZER_SETTINGS),
}


def init_checkpoint(
    llm: str,
    vision: str,
    output: str | Path,
    *,
    sizes: str | Path | None = None,
    image_size: int | None = None,
    use_mam: bool = True,
    chat_template: str | Path | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Owl2ForConditionalGeneration:
    """Put an untrained mPLUG-Owl2 together and write it, whole, to `output`.

    Args:
        llm: a LLaMA: a directory, a hub id, a ``.gguf`` file, or "fresh".
        vision: a CLIP tower: a directory, a hub id, or "fresh".
        sizes: a YAML file with the sizes of what is fresh (see above); default: the paper's.
        image_size: pixels; default: the tower's own, or the sizes'.
        use_mam: False for the paper's ablation.
        chat_template: a Jinja file instead of the paper's format; it marks what the model is to
            learn with ``{% generation %}``.
        dtype: of the weights, e.g. "bfloat16"; "auto": the language model's own.
        seed: of everything fresh.

    Raises:
        InputError: for parts that cannot be read or do not fit, and for unknown sizes.
    """
    if Path(output).exists():
        raise InputError(f"{output} exists already; give another --output or move it away")
    settings = _read_sizes(sizes)
    _refuse_unused(settings, sizes, llm, vision)
    require_writable(output)
    template = None if chat_template is None else _read_template(Path(chat_template))
    weights_dtype = None if dtype == "auto" else _dtype(dtype)
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerBase
    with TemporaryDirectory() as scratch:
        if llm == FRESH:
            tokenizer = _fresh_tokenizer(settings["tokenizer"], Path(scratch))
            language_model = _fresh_llm(settings["llm"], tokenizer)
        else:
            language_model = load_llm(llm, weights_dtype or "auto")
            tokenizer = load_tokenizer(llm)
        model = Owl2ForConditionalGeneration.from_backbones(
            language_model,
            settings["vision"] if vision == FRESH else load_vision(vision),
            abstractor=settings["abstractor"],
            image_size=image_size,
            use_mam=use_mam,
        )
        if weights_dtype is not None:
            model.to(weights_dtype)
        processor = _processor(model, tokenizer, template)
        with atomic_directory(output) as directory:
            model.save_pretrained(directory)
            processor.save_pretrained(directory)
    return model


def load_tokenizer(llm: str | Path) -> PreTrainedTokenizerBase:
    """A language model's tokenizer: exact for SentencePiece models, else transformers' own.

    Raises:
        InputError: if there is none that can be read.
    """
    path = Path(llm)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        file = cached_file(str(llm), TOKENIZER_FILE, _raise_exceptions_for_missing_entries=False)
        tokenizer_class = AutoTokenizer if file is None else Owl2Tokenizer
        return tokenizer_class.from_pretrained(str(llm))
    except (OSError, ValueError) as error:
        raise InputError(f"{llm} has no tokenizer that can be read: {error}") from error


def _processor(
    model: Owl2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
) -> Owl2Processor:
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the language model only "
            f"{config.vocab_size}: they do not belong together"
        )
    processor = Owl2Processor(
        Owl2ImageProcessor(config.image_size),
        tokenizer,
        template,
        num_image_tokens=config.num_image_tokens,
        image_token_id=config.image_token_id,
    )
    try:
        processor.apply_chat_template(PROBE, add_generation_prompt=True)
    except InputError as error:
        raise InputError(f"the chat template cannot be used: {error}", error.code) from error
    return processor


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the chat template {path} is not text in UTF-8") from error


def _read_sizes(path: str | Path | None) -> dict[str, dict[str, Any]]:
    given = {} if path is None else read_yaml(Path(path))
    for section, settings in given.items():
        known = look_up(f"section of {path}", section, SECTIONS)
        if not isinstance(settings, dict):
            raise InputError(f"{path}: `{section}` must hold `name: value` lines")
        for name in settings:
            look_up(f"setting of `{section}` in {path}", name, dict.fromkeys(known))
    return {section: dict(given.get(section) or {}) for section in SECTIONS}


def _refuse_unused(settings: dict[str, Any], path: Any, llm: str, vision: str) -> None:
    """Sizes of a part that is not fresh would change nothing."""
    for section, part in (("llm", llm), ("tokenizer", llm), ("vision", vision)):
        if settings[section] and part != FRESH:
            raise InputError(
                f"{path}: `{section}` has sizes of something fresh, but it comes from {part}: "
                "leave the section out"
            )


def _fresh_llm(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rms_norm_eps": 1e-5,
    }
    return random_llm(**ids | settings)


def _fresh_tokenizer(settings: dict[str, Any], directory: Path) -> Owl2Tokenizer:
    for name, kind in TOKENIZER_SETTINGS.items():
        if not isinstance(settings.get(name), kind):
            raise InputError(
                "a fresh language model needs the section `tokenizer` in --sizes, with `dataset` "
                "(a dataset's name) and `vocab_size` (a whole number)"
            )
    file = directory / TOKENIZER_FILE
    train_tokenizer(_words(settings["dataset"]), file, settings["vocab_size"])
    return Owl2Tokenizer(file)


def _words(dataset: str) -> list[str]:
    """What users and assistant say in a dataset's training split, each way of saying it once."""
    said: dict[str, None] = {}
    for sample in load_dataset(dataset, "train"):
        for message in sample.messages:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            for part in parts:
                if "text" in part:
                    said[f"{message['role'].upper()}: {part['text']}"] = None
    return list(said)


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return look_up("dtype", name, known)
