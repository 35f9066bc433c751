"""The one way from messages and pictures to the model's inputs; saved with every checkpoint.

::

    text with <|image|> ──split at each──► pieces ──tokenizer──► ids ──join with (K+1) × image_token_id──► input_ids (B,S)
    pictures ──Owl2ImageProcessor──► pixel_values (N,3,size,size), in order of appearance

B prompts, S tokens, N pictures in all, K learnable queries (a picture takes K+1 places).
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from owl2.errors import InputError
from owl2.processing import chat
from owl2.processing.chat import IMAGE_TOKEN, Conversation
from owl2.processing.image import ImagePolicy, Owl2ImageProcessor
from owl2.processing.labels import Learned, encode_learned, show
from owl2.processing.tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Owl2Tokenizer,
    encode,
    start_ids,
)

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.json", TOKENIZER_CONFIG_FILE)
_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, TEMPLATE_FILE, *_TOKENIZER_FILES)

_HUB_OPTIONS = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
}
# What AutoProcessor adds on its way to a processor class.
_FROM_AUTO = ("_from_auto", "code_revision", "trust_remote_code")

IGNORED = -100  # the label of a position without a loss, as PyTorch's cross-entropy has it


class Owl2Processor(ProcessorMixin):
    """Messages, prompts and pictures → the model's inputs, and ids → text.

    `num_image_tokens`: the places of a picture, K+1. `image_token_id`: the id that marks them, just
    past the model's vocabulary (default: `len(tokenizer)`). `chat_template`: Jinja; default: SPEC
    1.5. Prompts are padded on the tokenizer's `padding_side`, which is set to left: what generation
    needs.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        image_processor: Owl2ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_image_tokens: int = 65,
        image_token_id: int | None = None,
    ) -> None:
        # Not the mixin's own __init__: it asks for transformers' image processor classes, whose
        # pixels are others.
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self.chat_template = chat.DEFAULT_CHAT_TEMPLATE if chat_template is None else chat_template
        self.num_image_tokens = num_image_tokens
        self.image_token_id = len(tokenizer) if image_token_id is None else image_token_id
        self._start_ids = start_ids(tokenizer)
        pad = tokenizer.pad_token_id
        end = tokenizer.eos_token_id
        self._pad_id = pad if pad is not None else end if end is not None else 0

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"]

    # -------------------------------------------------------------- prompts

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_mm_token_type_ids: bool = True,
    ) -> BatchFeature:
        """Prompts with `<|image|>` and their pictures → `input_ids`, `attention_mask`,
        `mm_token_type_ids` (all (B,S)) and `pixel_values` (N,3,size,size; absent without pictures).

        `images`: in order of appearance, all prompts' in one list, or a list for each prompt.
        `padding`: True or "longest", "max_length" (with `max_length`), False; `padding_side`:
        "left" or "right".

        Raises `InputError`: counts of placeholders and pictures differ, a picture cannot be read,
        prompts of different lengths as tensors without padding.
        """
        if truncation:
            raise InputError(
                "Prompts are never cut (a question or a picture would go): shorten the text."
            )
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise InputError("`text` must be a prompt or a non-empty list of prompts (strings).")
        pictures = _match_pictures([prompt.count(IMAGE_TOKEN) for prompt in texts], images)
        rows = [self._encode(prompt, add_special_tokens) for prompt in texts]
        data = self._pad(
            rows, padding, padding_side, max_length, pad_to_multiple_of, return_tensors
        )
        if not return_mm_token_type_ids:
            del data["mm_token_type_ids"]
        if pictures:
            data.update(self.image_processor(pictures, return_tensors=return_tensors))
        return BatchFeature(data, tensor_type=return_tensors)

    def _encode(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """A prompt → its ids, every `<|image|>` as K+1 × `image_token_id`."""
        ids: list[int] = []
        for number, piece in enumerate(prompt.split(IMAGE_TOKEN)):
            if number:
                ids += [self.image_token_id] * self.num_image_tokens
            ids += encode(self.tokenizer, piece)
        if add_special_tokens and ids[: len(self._start_ids)] != self._start_ids:
            return self._start_ids + ids
        return ids

    def _pad(
        self,
        rows: list[list[int]],
        padding: bool | str,
        side: str | None,
        max_length: int | None,
        multiple: int | None,
        return_tensors: str | None,
    ) -> dict[str, Any]:
        side = side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise InputError(f"padding_side is {side!r}; it must be 'left' or 'right'.")
        lengths = [len(row) for row in rows]
        width = _padded_width(lengths, padding, max_length, multiple, return_tensors)
        data: dict[str, Any] = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": []}
        for row in rows:
            empty = max(0, width - len(row))
            before, after = (empty, 0) if side == "left" else (0, empty)
            types = [int(id_ == self.image_token_id) for id_ in row]
            data["input_ids"].append([self._pad_id] * before + row + [self._pad_id] * after)
            data["attention_mask"].append([0] * before + [1] * len(row) + [0] * after)
            data["mm_token_type_ids"].append([0] * before + types + [0] * after)
        return data

    # -------------------------------------------------------------- messages

    def apply_chat_template(  # type: ignore[override]  # what the mixin takes beyond this is refused, not ignored
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Messages (or a list of such) → the prompt as text, as ids, or as all of the model's
        inputs.

        As transformers has it: `tokenize=False` gives the text (a list for a list), `tokenize=True`
        the ids, with `return_dict=True` the `BatchFeature` of `__call__`, pictures of the messages
        read. `add_generation_prompt` opens the assistant's turn. Other keywords are variables of
        the template, and it must know them.

        Raises `InputError`: see `chat.read_messages` and `__call__`.
        """
        template = self.chat_template if chat_template is None else chat_template
        for name in variables:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise TypeError(
                    f"apply_chat_template() got an unexpected argument {name!r}, and the chat template has no "
                    "variable of that name"
                )
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = [
            chat.read_messages(messages)
            for messages in (conversation if is_batch else [conversation])
        ]
        for item in conversations:
            if item.is_open and continue_final_message:
                raise InputError(
                    "continue_final_message needs an assistant turn at the end to continue."
                )
            if not item.is_open and add_generation_prompt:
                raise InputError(
                    "The last message is an answer: end with a user turn to open the next one."
                )
        texts = [
            chat.render(
                item,
                template,
                self.tokenizer.special_tokens_map,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            for item in conversations
        ]
        if not tokenize:
            return texts if is_batch else texts[0]
        inputs = self(
            text=texts,
            images=[list(item.pictures) for item in conversations],
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
            **(processor_kwargs or {}),
        )
        return inputs if return_dict else inputs["input_ids"]

    # -------------------------------------------------------------- training

    def for_training(self, messages: Any, max_length: int | None = None) -> BatchFeature:
        """One closed conversation → a batch of one: `input_ids`, `attention_mask`,
        `mm_token_type_ids`, `labels` (all (1,S)) and `pixel_values` (N,3,size,size; absent without
        pictures).

        `labels` are the ids of what the template marks as generated (the answers and their end
        tokens), -100 elsewhere. `max_length`: longer samples are cut at the right, which can leave
        no label at all.

        Raises `InputError`: see `chat.read_messages` and `__call__`; also when a picture is beyond
        `max_length`.
        """
        conversation = chat.read_messages(messages)
        sample = self._encode_learned(conversation)
        pictures = _match_pictures([len(sample.image_ends)], list(conversation.pictures))
        ids, learned = sample.ids, sample.learned
        if max_length is not None and len(ids) > max_length:
            if sample.image_ends and sample.image_ends[-1] > max_length:
                raise InputError(
                    f"The sample has {len(ids)} tokens and its last picture ends at token "
                    f"{sample.image_ends[-1]}, beyond max_length {max_length}: give fewer pictures or "
                    "words, or a larger max_length."
                )
            ids, learned = ids[:max_length], learned[:max_length]
        input_ids = torch.tensor([ids])
        data = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.image_token_id).long(),
            "labels": input_ids.masked_fill(~torch.tensor([learned]), IGNORED),
        }
        if pictures:
            data.update(self.image_processor(pictures))
        return BatchFeature(data)

    def show_labels(self, messages: Any) -> Text:
        """The conversation as the model gets it, for a terminal: what is learned in colour, the
        rest dim.

        From the ids and mask of `for_training`; a picture's places are written `<|image|>×(K+1)`.
        The pictures are not opened.
        """
        sample = self._encode_learned(chat.read_messages(messages))
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._start_ids))
        return show(sample, start, self.num_image_tokens)

    def _encode_learned(self, conversation: Conversation) -> Learned:
        if conversation.is_open:
            raise InputError(
                "The last turn has no answer, so there is nothing to learn from it: add it."
            )
        if self.tokenizer.eos_token is None:
            raise InputError(
                "The tokenizer has no end token, so no model could learn to stop: set eos_token."
            )
        text, spans = chat.render_with_answers(
            conversation, self.chat_template, self.tokenizer.special_tokens_map
        )
        image_ids = [self.image_token_id] * self.num_image_tokens
        return encode_learned(self.tokenizer, text, spans, self._start_ids, image_ids)

    # -------------------------------------------------------------- ids → text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Ids (a list or a tensor; or rows of them) → text (or a list). The K+1 places of a picture
        are one `<|image|>`, or nothing with `skip_special_tokens`."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        if ids and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
        pieces = []
        for is_image, run in groupby(ids, key=lambda id_: id_ == self.image_token_id):
            if not is_image:
                pieces.append(self.tokenizer.decode(list(run), skip_special_tokens, **kwargs))
            elif not skip_special_tokens:
                pieces.append(self.image_token * -(-len(list(run)) // self.num_image_tokens))
        return "".join(pieces)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """`decode` for each row."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    # -------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds; the rest is in the files of the tokenizer and the pictures."""
        config: dict[str, Any] = {
            "processor_class": "Owl2Processor",
            "num_image_tokens": self.num_image_tokens,
        }
        if self.image_token_id != len(self.tokenizer):
            config["image_token_id"] = self.image_token_id
        return config

    def save_pretrained(  # type: ignore[override]  # uploading is not offered
        self, save_directory: str | Path, push_to_hub: bool = False
    ) -> list[str]:
        """Writes the tokenizer, `preprocessor_config.json`, `processor_config.json`, `chat_template.jinja`."""
        if push_to_hub:
            raise InputError(
                "push_to_hub is not offered: save, then run `hf upload REPO DIRECTORY`."
            )
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(str(directory)))
        # After the tokenizer, which may have written a template of its own.
        texts = {
            PREPROCESSOR_FILE: _json(self.image_processor.to_dict()),
            PROCESSOR_FILE: _json(self.to_dict()),
            TEMPLATE_FILE: self.chat_template,
        }
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        return files + [str(directory / name) for name in texts]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # other keywords are refused, not handed on
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        chat_template: str | None = None,
        image_policy: ImagePolicy | None = None,
        max_pixels: int | None = None,
        **hub: Any,
    ) -> "Owl2Processor":
        """The processor of a checkpoint: a directory or a hub id, ours or in the released layout.

        `chat_template`, `image_policy`, `max_pixels`: instead of what the checkpoint says. `hub`:
        `revision`, `token`, `cache_dir`, `local_files_only`, ..., as everywhere in transformers.

        Raises `InputError` that names what the checkpoint lacks.
        """
        for key in _FROM_AUTO:
            hub.pop(key, None)
        if unknown := sorted(hub.keys() - _HUB_OPTIONS):
            raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(unknown)}")
        files = _find_files(str(pretrained_model_name_or_path), hub)
        config = _read_json(files[CONFIG_FILE])
        own = _read_json(files[PROCESSOR_FILE])
        pixels = _read_json(files[PREPROCESSOR_FILE])
        if image_policy is not None:
            pixels["image_policy"] = image_policy
        if max_pixels is not None:
            pixels["max_pixels"] = max_pixels
        tokenizer_class = AutoTokenizer if files[TOKENIZER_FILE] is None else Owl2Tokenizer
        tokenizer = tokenizer_class.from_pretrained(str(pretrained_model_name_or_path), **hub)
        saved = files[TEMPLATE_FILE]
        if chat_template is None:
            chat_template = saved.read_text(encoding="utf-8") if saved else tokenizer.chat_template
        abstractor = config.get("visual_config", {}).get("visual_abstractor", {})
        queries = abstractor.get("num_learnable_queries", 64)
        return cls(
            Owl2ImageProcessor.from_dict(pixels),
            tokenizer,
            chat_template,
            # The model's own configuration comes first: it is what the ids must fit.
            queries + 1 if config else own.get("num_image_tokens", 65),
            max(config["vocab_size"], len(tokenizer))
            if "vocab_size" in config
            else own.get("image_token_id"),
        )


def _find_files(name: str, hub: dict[str, Any]) -> dict[str, Path | None]:
    """The processor's files in a directory or on the hub, None for those that are not there."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise InputError(
            f"There is no directory '{name}' to load a processor from. Check the path."
        )
    files: dict[str, Path | None] = {}
    for file in _FILES:
        try:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        except OSError as error:
            raise InputError(
                f"'{name}' is no directory, and cannot be had from the hub: {error}"
            ) from error
        files[file] = Path(found) if found else None
    missing = []
    if not any(files[file] for file in _TOKENIZER_FILES):
        missing.append(f"a tokenizer ({' or '.join(_TOKENIZER_FILES[:2])})")
    if files[PREPROCESSOR_FILE] is None:
        missing.append(f"the picture settings ({PREPROCESSOR_FILE})")
    if missing:
        raise InputError(
            f"'{name}' holds no processor: {' and '.join(missing)} missing. Copy the files from the "
            "checkpoint it was made from, or make one with `owl2 init`."
        )
    return files


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _match_pictures(counts: Sequence[int], images: Any) -> list[Any]:
    """Pictures as they were given → one flat list that fits the placeholders of each prompt, or `InputError`."""
    if images is None:
        images = []
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    elif not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(item, (list, tuple)) or item is None for item in images):
        if len(images) != len(counts):
            raise InputError(f"{len(counts)} prompts, but pictures for {len(images)} were given.")
        rows = [
            list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
            for row in images
        ]
        for number, (count, row) in enumerate(zip(counts, rows, strict=True)):
            if count != len(row):
                which = f"Prompt {number + 1} of {len(counts)}" if len(counts) > 1 else "The prompt"
                raise _miscount(which, count, len(row))
        return [picture for row in rows for picture in row]
    if sum(counts) != len(images):
        raise _miscount("The prompt" if len(counts) == 1 else "The batch", sum(counts), len(images))
    return list(images)


def _miscount(which: str, placeholders: int, pictures: int) -> InputError:
    return InputError(
        f"{which} has {placeholders} {IMAGE_TOKEN} placeholder{'s' * (placeholders != 1)}, but {pictures} "
        f"picture{'s' * (pictures != 1)} {'were' if pictures != 1 else 'was'} given: each placeholder "
        "takes one picture."
    )


def _padded_width(
    lengths: Sequence[int],
    padding: bool | str,
    max_length: int | None,
    multiple: int | None,
    return_tensors: str | None,
) -> int:
    """How many tokens every row is filled up to (0: not at all)."""
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise InputError(
            f"padding is {padding!r}; it must be True, False, 'longest' or 'max_length'."
        )
    if padding == "max_length":
        if max_length is None:
            raise InputError("padding='max_length' needs max_length.")
        if max(lengths) > max_length:
            raise InputError(
                f"A prompt has {max(lengths)} tokens, {max(lengths) - max_length} more than max_length {max_length}."
            )
        width = max_length
    elif padding in (True, "longest"):
        width = max(lengths)
    elif return_tensors is not None and len(set(lengths)) > 1:
        raise InputError(
            f"Prompts of {min(lengths)} to {max(lengths)} tokens do not fit into one tensor: pass padding=True."
        )
    else:
        return 0
    return -(-width // multiple) * multiple if multiple else width
