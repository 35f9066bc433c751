"""Messages and images to the model's inputs. A processor is saved with every checkpoint.

::

    text ──split at each <|image|>──► segments ──tokenizer──► ids of each segment
         ──joined with (K+1) × image_token_id──► input_ids (B,S), attention_mask, mm_token_type_ids
    images ──Owl2ImageProcessor──► pixel_values (N,3,size,size), in order of appearance

B prompts, S tokens, N images in the batch, K learnable queries (an image takes K+1 tokens).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from owl2.constants import IGNORE_INDEX
from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.processing import pretrained_files
from owl2.processing.chat_template import (
    IMAGE_TOKEN,
    ParsedMessages,
    Spans,
    has_variable,
    insert_image_newlines,
    parse_messages,
    render,
    require_template,
    validate_prompt,
)
from owl2.processing.default_templates import CHAT_TEMPLATES
from owl2.processing.image_processing import ImagePolicy, Owl2ImageProcessor
from owl2.processing.loss_mask import EncodedConversation, encode_with_loss_mask, render_mask
from owl2.processing.prepared_prompt import PreparedPrompt, flatten_images
from owl2.processing.tokenizer import add_image_token, encode, start_ids


class Owl2Processor(ProcessorMixin):
    """Messages, prompts and images to the model's inputs, and ids to text.

    Prompts are padded on the tokenizer's `padding_side`, which is set to left for generation.

    Args:
        chat_template: A Jinja template, or a name in `CHAT_TEMPLATES`. Default: Specification §1.5.
        num_image_tokens: Tokens of an image, K+1.
        image_token_id: Id of `<|image|>` for a tokenizer without this token. Default:
            `len(tokenizer)`.
        image_newline: Insert a line break between the images that start a user turn and its text,
            as training does. It is saved; the released checkpoint has none.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        image_processor: Owl2ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_image_tokens: int = 65,
        image_token_id: int | None = None,
        image_newline: bool = False,
    ) -> None:
        # Not the mixin's __init__, which requires transformers' image processors: other pixels.
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self.chat_template = CHAT_TEMPLATES.get(chat_template or "mplug_owl2", chat_template)
        self.image_newline = image_newline
        self.num_image_tokens = num_image_tokens
        self.image_token_id = add_image_token(tokenizer, image_token_id)
        if tokenizer.pad_token is None:  # `pad` requires one; the mask makes its id irrelevant
            tokenizer.pad_token = tokenizer.eos_token
        self._start_ids = start_ids(tokenizer)
        self._image_ids = [self.image_token_id] * num_image_tokens

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"]

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
        """Prompts with `<|image|>` and their images to the model's inputs.

        Args:
            images: In order of appearance: one list for all prompts, or a list for each prompt.
            padding: True or "longest", "max_length" (with `max_length`), or False.
            padding_side: "left" or "right".

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 image), all (B,S), and
            `pixel_values` (N,3,size,size), absent without images.

        Raises:
            InputError: The numbers of placeholders and images differ, an image cannot be read, or
                prompts of different lengths are requested as tensors without padding.
        """
        if truncation:
            raise InputError(
                "truncation is not supported, because it could remove the question or a part of an "
                "image: shorten the text.",
                ErrorCode.UNSUPPORTED,
            )
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise InputError(
                "`text` must be a prompt or a non-empty list of strings.", ErrorCode.INVALID_TYPE
            )
        images = flatten_images([prompt.count(IMAGE_TOKEN) for prompt in texts], images)
        rows = [self._encode(prompt, add_special_tokens) for prompt in texts]
        longest = max(map(len, rows))
        if padding == "max_length" and (max_length is None or max_length < longest):
            raise InputError(
                f"padding='max_length' requires a max_length of at least {longest}, the tokens of "
                f"the longest prompt, not {max_length}.",
                ErrorCode.MISSING_VALUE if max_length is None else ErrorCode.TOO_LONG,
            )
        pixels = self.image_processor(images, return_tensors=return_tensors) if images else {}
        try:
            data = dict(
                self.tokenizer.pad(
                    {"input_ids": rows},
                    padding,
                    max_length,
                    pad_to_multiple_of,
                    padding_side,
                    return_attention_mask=True,
                )
            )
            if return_mm_token_type_ids:
                data["mm_token_type_ids"] = [
                    [int(id_ == self.image_token_id) for id_ in row] for row in data["input_ids"]
                ]
            return BatchFeature(data | pixels, tensor_type=return_tensors)
        except ValueError as error:  # of transformers: an invalid option, or different lengths
            raise InputError(
                f"The prompts cannot be padded: {error}", ErrorCode.INVALID_VALUE
            ) from error

    def _encode(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, with K+1 × `image_token_id` for every `<|image|>`."""
        image, num_ids = self.image_token_id, self.num_image_tokens
        encoded = encode(self.tokenizer, prompt)
        ids = [id_ for id_ in encoded for _ in range(num_ids if id_ == image else 1)]
        if add_special_tokens and ids[: len(self._start_ids)] != self._start_ids:
            return self._start_ids + ids
        return ids

    def apply_chat_template(  # type: ignore[override]  # rejects unsupported arguments of the mixin
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
        """The prompt of a conversation (or a list of conversations), as in transformers.

        Args:
            add_generation_prompt: Start the assistant's turn.
            tokenize: Return ids, or with `return_dict` the `BatchFeature` of `__call__` including
                images. False returns text.
            processor_kwargs: Further arguments of `__call__`.
            variables: Variables of the template, which must use them.

        Raises:
            InputError: See `parse_messages` and `__call__`.
        """
        template = require_template(self.chat_template if chat_template is None else chat_template)
        if unknown := [name for name in variables if not has_variable(template, name)]:
            raise TypeError(
                f"apply_chat_template() got unexpected arguments: {', '.join(unknown)}, which are "
                "not variables of the chat template"
            )
        first = next(iter(conversation), None) if isinstance(conversation, (list, tuple)) else None
        is_batch = isinstance(first, (list, tuple))
        conversations = [
            parse_messages(messages) for messages in (conversation if is_batch else [conversation])
        ]
        variables["add_generation_prompt"] = add_generation_prompt
        variables["continue_final_message"] = continue_final_message
        texts = [self._render(item, template, **variables)[0] for item in conversations]
        if not tokenize:
            return texts if is_batch else texts[0]
        options: dict[str, Any] = {"padding": padding, "padding_side": padding_side}
        options |= {"return_tensors": return_tensors} | (processor_kwargs or {})
        images = [list(item.images) for item in conversations]
        inputs = self(text=texts, images=images, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode(self, messages: Any) -> PreparedPrompt:
        """The prompt for the answer to a conversation: messages are parsed and images read once.

        Raises:
            InputError: See `validate_prompt`; an image is missing or cannot be read.
        """
        parsed = validate_prompt(messages)
        text, _ = self._render(parsed, self.chat_template, add_generation_prompt=True)
        images = flatten_images([text.count(IMAGE_TOKEN)], [list(parsed.images)])
        pixels = self.image_processor(images)["pixel_values"] if images else None
        ids = self._encode(text)
        return PreparedPrompt.from_ids(ids, pixels, self.image_token_id, self.num_image_tokens)

    def for_training(
        self, messages: Any, max_length: int | None = None, return_pixel_values: bool = True
    ) -> BatchFeature:
        """A conversation that ends with an answer as a batch of one.

        Args:
            max_length: Truncate longer samples on the right, which can remove all labels.
            return_pixel_values: False for a check that opens no image.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels`, all (1,S), and
            `pixel_values` (N,3,size,size), absent without images. `labels` are the ids in the
            template's generation blocks (the answers and their end tokens), -100 elsewhere.

        Raises:
            InputError: See `parse_messages` and `__call__`; also if an image is beyond
                `max_length`.
        """
        conversation = parse_messages(messages)
        sample = self.encode_labeled(conversation)
        images = flatten_images([len(sample.image_ends)], list(conversation.images))
        ids, loss_mask = sample.ids, sample.loss_mask
        if max_length is not None and len(ids) > max_length:
            if sample.image_ends and sample.image_ends[-1] > max_length:
                raise InputError(
                    f"The sample has {len(ids)} tokens and its last image ends at token "
                    f"{sample.image_ends[-1]}, beyond max_length {max_length}: use fewer images, a "
                    "shorter text, or a larger max_length.",
                    ErrorCode.TOO_LONG,
                )
            ids, loss_mask = ids[:max_length], loss_mask[:max_length]
        input_ids = torch.tensor([ids])
        data = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.image_token_id).long(),
            "labels": input_ids.masked_fill(~torch.tensor([loss_mask]), IGNORE_INDEX),
        }
        if images and return_pixel_values:
            data.update(self.image_processor(images))
        return BatchFeature(data)

    def show_labels(self, messages: Any) -> Text:
        """The model's input in training for a terminal: labels in color, other tokens dim.

        It is rendered from the ids and the mask of `for_training`. The tokens of an image are
        written as `<|image|>×(K+1)`, and images are not opened.
        """
        sample = self.encode_labeled(parse_messages(messages))
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._start_ids))
        return render_mask(sample, start, self.num_image_tokens)

    def encode_labeled(self, conversation: ParsedMessages) -> EncodedConversation:
        """The ids of a conversation that ends with an answer, with the loss mask of training.

        Raises:
            InputError: There is no answer, the tokenizer has no end token or no offsets, or the
                template does not mark the answers.
        """
        if conversation.is_open:
            raise InputError(
                "The last turn has no answer to train on: add it.", ErrorCode.INVALID_ROLE
            )
        if self.tokenizer.eos_token is None:
            raise InputError(
                "The tokenizer has no end token to learn: set eos_token.", ErrorCode.MISSING_VALUE
            )
        turns = conversation.without_end_tokens(self.tokenizer.eos_token)
        text, spans = self._render(turns, self.chat_template, return_assistant_tokens_mask=True)
        ids = (self._start_ids, self._image_ids)
        return encode_with_loss_mask(self.tokenizer, text, spans, *ids, conversation.has_loss)

    def _render(self, turns: ParsedMessages, template: Any, **options: Any) -> tuple[str, Spans]:
        turns = insert_image_newlines(turns) if self.image_newline else turns
        return render(turns, template, self.tokenizer.special_tokens_map, **options)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Ids (a list, a tensor, or a batch of them) to text (or a list of texts).

        The K+1 tokens of an image become one `<|image|>`, or nothing with `skip_special_tokens`.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        if len(ids) and hasattr(ids[0], "__len__"):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
        text: Any = self.tokenizer.decode(ids, skip_special_tokens, **kwargs)
        image_tokens = rf"(?:{re.escape(IMAGE_TOKEN)}){{1,{self.num_image_tokens}}}"
        return re.sub(image_tokens, IMAGE_TOKEN, text)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """`decode` for each row."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """`batch_decode` for the pipelines of transformers."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of `processor_config.json`."""
        config: dict[str, Any] = {
            "processor_class": "Owl2Processor",
            "num_image_tokens": self.num_image_tokens,
        }
        if self.image_newline:
            config["image_newline"] = True
        return config

    def save_pretrained(  # type: ignore[override]  # without upload
        self, save_directory: str | Path, push_to_hub: bool = False
    ) -> list[str]:
        """Write the files of the tokenizer, the image processor, the processor and the template.

        Returns:
            Paths of the files.
        """
        if push_to_hub:
            raise InputError(
                "push_to_hub is not supported: save, then run `hf upload REPO DIRECTORY`.",
                ErrorCode.UNSUPPORTED,
            )
        directory, template = Path(save_directory), require_template(self.chat_template)
        directory.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(str(directory)))
        contents = self.image_processor.to_dict(), self.to_dict(), template
        return files + pretrained_files.write_files(directory, *contents)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # rejects unknown arguments
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        chat_template: str | None = None,
        image_policy: ImagePolicy | None = None,
        max_pixels: int | None = None,
        image_newline: bool | None = None,
        **hub: Any,
    ) -> "Owl2Processor":
        """The processor of a checkpoint, a directory or a hub id.

        Args:
            chat_template, image_policy, max_pixels, image_newline: Instead of the checkpoint's.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, ..., as in transformers.

        Raises:
            InputError: A file is missing or invalid.
        """
        settings = pretrained_files.read_processor(str(pretrained_model_name_or_path), hub)
        settings["image_processor"] = settings["image_processor"].replace(image_policy, max_pixels)
        own = {"chat_template": chat_template, "image_newline": image_newline}
        return cls(**settings | {key: value for key, value in own.items() if value is not None})


AutoProcessor.register(Owl2Config, Owl2Processor)
