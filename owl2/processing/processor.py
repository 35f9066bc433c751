"""The one way from messages and images to the model's inputs; saved with every checkpoint.

::

    text ──split at each <|image|>──► pieces ──tokenizer──► ids of each
         ──joined with (K+1) × image_token_id──► input_ids (B,S), attention_mask, mm_token_type_ids
    images ──Owl2ImageProcessor──► pixel_values (N,3,size,size), in order of appearance

B prompts, S tokens, N images in all, K learnable queries (an image takes K+1 places).
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from owl2.constants import IGNORE_INDEX
from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.processing import pretrained_files as saved
from owl2.processing.batching import flatten_images, pad
from owl2.processing.chat_template import (
    DEFAULT_CHAT_TEMPLATE,
    IMAGE_TOKEN,
    ParsedMessages,
    has_variable,
    parse_messages,
    render,
    render_with_answers,
    validate_prompt,
)
from owl2.processing.image_processing import ImagePolicy, Owl2ImageProcessor
from owl2.processing.loss_mask import EncodedConversation, encode_with_loss_mask, render_mask
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.processing.tokenizer import encode, start_ids

_HUB_OPTIONS = frozenset(
    ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
)
# What AutoProcessor and pipelines add on their way to a processor class.
_FROM_AUTO = frozenset(
    ("_commit_hash", "_from_auto", "_from_pipeline", "code_revision", "dtype", "trust_remote_code")
)


class Owl2Processor(ProcessorMixin):
    """Messages, prompts and images → the model's inputs, and ids → text.

    `num_image_tokens`: the places of an image, K+1. `image_token_id`: the id that marks them, just
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
        self.chat_template = DEFAULT_CHAT_TEMPLATE if chat_template is None else chat_template
        self.num_image_tokens = num_image_tokens
        self.image_token_id = len(tokenizer) if image_token_id is None else image_token_id
        if self.image_token_id < len(tokenizer):
            raise InputError(
                f"image_token_id {image_token_id} is one of the tokenizer's {len(tokenizer)} "
                "tokens; it must lie past the vocabulary."
            )
        self._start_ids = start_ids(tokenizer)
        pad = tokenizer.pad_token_id
        end = tokenizer.eos_token_id
        self._pad_id = pad if pad is not None else end if end is not None else 0

    @property
    def _template(self) -> str:
        # The mixin allows several templates by name; ours has one, which can be set.
        if not isinstance(self.chat_template, str):
            raise InputError(f"The chat template must be a Jinja text, not {self.chat_template!r}.")
        return self.chat_template

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
        """Prompts with `<|image|>` and their images → the model's inputs.

        These are `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 image; all (B,S))
        and `pixel_values` (N,3,size,size; absent without images).

        `images`: in order of appearance, all prompts' in one list, or a list for each prompt.
        `padding`: True or "longest", "max_length" (with `max_length`), False; `padding_side`:
        "left" or "right".

        Raises `InputError`: counts of placeholders and images differ, an image cannot be read,
        prompts of different lengths as tensors without padding.
        """
        if truncation:
            raise InputError(
                "Prompts are never cut (a question or an image would go): shorten the text."
            )
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise InputError("`text` must be a prompt or a non-empty list of prompts (strings).")
        images = flatten_images([prompt.count(IMAGE_TOKEN) for prompt in texts], images)
        rows = [self._encode(prompt, add_special_tokens) for prompt in texts]
        data: dict[str, Any] = pad(
            rows,
            self._pad_id,
            padding_side or self.tokenizer.padding_side,
            padding,
            max_length,
            pad_to_multiple_of,
            as_tensor=return_tensors is not None,
        )
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = [
                [int(id_ == self.image_token_id) for id_ in row] for row in data["input_ids"]
            ]
        if images:
            data.update(self.image_processor(images, return_tensors=return_tensors))
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

    # -------------------------------------------------------------- messages

    def apply_chat_template(  # type: ignore[override]  # what this lacks of the mixin's is refused
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
        """Messages (or a list of such) → the prompt as text, as ids, or as the model's inputs.

        As transformers has it: `tokenize=False` gives the text (a list for a list), `tokenize=True`
        the ids, with `return_dict=True` the `BatchFeature` of `__call__`, images of the messages
        read. `add_generation_prompt` opens the assistant's turn. `processor_kwargs`: further
        keywords of `__call__`; all others are variables of the template, and it must know them.

        Raises `InputError`: see `parse_messages` and `__call__`.
        """
        template = self._template if chat_template is None else chat_template
        if unknown := [name for name in variables if not has_variable(template, name)]:
            raise TypeError(
                f"apply_chat_template() got unexpected arguments: {', '.join(unknown)}, which are "
                "no variables of the chat template either"
            )
        is_batch = isinstance(conversation, (list, tuple)) and isinstance(
            next(iter(conversation), None), (list, tuple)
        )
        conversations = [
            parse_messages(messages) for messages in (conversation if is_batch else [conversation])
        ]
        texts = [
            render(
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
        options = {
            "padding": padding,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
            **(processor_kwargs or {}),
        }
        images = [list(item.images) for item in conversations]
        inputs = self(text=texts, images=images, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode(self, messages: Any) -> PreparedPrompt:
        """The prompt for the answer to a conversation: messages are parsed and images read once.

        Raises:
            InputError: See `validate_prompt`; an image is missing or cannot be read.
        """
        parsed = validate_prompt(messages)
        special_tokens = self.tokenizer.special_tokens_map
        text = render(parsed, self._template, special_tokens, add_generation_prompt=True)
        images = flatten_images([text.count(IMAGE_TOKEN)], [list(parsed.images)])
        pixels = self.image_processor(images)["pixel_values"] if images else None
        ids = self._encode(text)
        return PreparedPrompt.from_ids(ids, pixels, self.image_token_id, self.num_image_tokens)

    # -------------------------------------------------------------- training

    def for_training(self, messages: Any, max_length: int | None = None) -> BatchFeature:
        """One conversation that ends with an answer → a batch of one.

        It holds `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (all (1,S)) and
        `pixel_values` (N,3,size,size; absent without images).

        `labels` are the ids of what the template marks as generated (the answers and their end
        tokens), -100 elsewhere. `max_length`: longer samples are cut at the right, which can leave
        no label at all.

        Raises `InputError`: see `parse_messages` and `__call__`; also when an image is beyond
        `max_length`.
        """
        conversation = parse_messages(messages)
        sample = self._encode_learned(conversation)
        images = flatten_images([len(sample.image_ends)], list(conversation.images))
        ids, learned = sample.ids, sample.loss_mask
        if max_length is not None and len(ids) > max_length:
            if sample.image_ends and sample.image_ends[-1] > max_length:
                raise InputError(
                    f"The sample has {len(ids)} tokens and its last image ends at token "
                    f"{sample.image_ends[-1]}, beyond max_length {max_length}: give fewer images "
                    "or words, or a larger max_length.",
                    ErrorCode.TOO_LONG,
                )
            ids, learned = ids[:max_length], learned[:max_length]
        input_ids = torch.tensor([ids])
        data = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.image_token_id).long(),
            "labels": input_ids.masked_fill(~torch.tensor([learned]), IGNORE_INDEX),
        }
        if images:
            data.update(self.image_processor(images))
        return BatchFeature(data)

    def count_tokens(self, messages: Any) -> int:
        """How many tokens a conversation has for training, before any is cut."""
        return len(self._encode_learned(parse_messages(messages)).ids)

    def show_labels(self, messages: Any) -> Text:
        """The conversation as the model gets it, for a terminal: learned in colour, the rest dim.

        From the ids and mask of `for_training`; an image's places are written `<|image|>×(K+1)`.
        The images are not opened.
        """
        sample = self._encode_learned(parse_messages(messages))
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._start_ids))
        return render_mask(sample, start, self.num_image_tokens)

    def _encode_learned(self, conversation: ParsedMessages) -> EncodedConversation:
        if conversation.is_open:
            raise InputError(
                "The last turn has no answer, so there is nothing to learn from it: add it.",
                ErrorCode.INVALID_ROLE,
            )
        if self.tokenizer.eos_token is None:
            raise InputError(
                "The tokenizer has no end token, so no model could learn to stop: set eos_token."
            )
        text, spans = render_with_answers(
            conversation, self._template, self.tokenizer.special_tokens_map
        )
        image_ids = [self.image_token_id] * self.num_image_tokens
        return encode_with_loss_mask(self.tokenizer, text, spans, self._start_ids, image_ids)

    # -------------------------------------------------------------- ids → text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Ids (a list or a tensor; or rows of them) → text (or a list). The K+1 places of an image
        are one `<|image|>`, or nothing with `skip_special_tokens`."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) and hasattr(ids[0], "__len__"):
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

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """`batch_decode` by the name that transformers' pipeline uses (the mixin's own would give
        the places of images to the tokenizer)."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    # -------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds; the rest is in the other files."""
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
        """Writes the tokenizer's files, `preprocessor_config.json`, `processor_config.json` and
        `chat_template.jinja`; returns their paths."""
        if push_to_hub:
            raise InputError(
                "push_to_hub is not offered: save, then run `hf upload REPO DIRECTORY`."
            )
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(str(directory)))
        # After the tokenizer, which may have written a template of its own.
        texts = {
            saved.PREPROCESSOR_FILE: saved.as_json(self.image_processor.to_dict()),
            saved.PROCESSOR_FILE: saved.as_json(self.to_dict()),
            saved.TEMPLATE_FILE: self._template,
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
        name = str(pretrained_model_name_or_path)
        files = saved.find_files(name, hub)
        config = saved.read_json(files[saved.CONFIG_FILE])
        own = saved.read_json(files[saved.PROCESSOR_FILE])
        visual = saved.section(config, "visual_config")
        pixels = saved.read_json(files[saved.PREPROCESSOR_FILE])
        if not pixels:  # all else about pixels has one value in every such checkpoint (SPEC 1.5)
            pixels = {
                "size": saved.number(saved.section(visual, "visual_model"), "image_size", 448)
            }
        image_processor = Owl2ImageProcessor.from_dict(pixels).replace(image_policy, max_pixels)
        saved_template = saved.read_template(files[saved.TEMPLATE_FILE])
        chat_template = saved_template if chat_template is None else chat_template
        tokenizer = saved.load_tokenizer(name, files, hub)
        size = len(tokenizer)
        num_image_tokens = saved.number(own, "num_image_tokens", 65, saved.PROCESSOR_FILE)
        image_token_id = saved.number(own, "image_token_id", size, saved.PROCESSOR_FILE)
        if config:
            # The model's own configuration comes first: it is what the ids must fit.
            abstractor = saved.section(visual, "visual_abstractor")
            num_image_tokens = saved.number(abstractor, "num_learnable_queries", 64) + 1
            image_token_id = max(saved.number(config, "vocab_size", size), size)
        return cls(
            image_processor,
            tokenizer,
            tokenizer.chat_template if chat_template is None else chat_template,
            num_image_tokens,
            image_token_id,
        )


AutoProcessor.register(Owl2Config, Owl2Processor)
