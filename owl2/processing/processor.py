"""Messages and images to the model's inputs. A processor is saved with every checkpoint.

::

    text ──split at each <|image|>──► segments ──tokenizer──► ids of each segment
         ──joined with (K+1) × image_token_id──► input_ids (B,S), attention_mask, mm_token_type_ids
    images ──Owl2ImageProcessor──► pixel_values (N,3,size,size), in order of appearance
    videos ──sample_frames──► each <|video|> is replaced by the <|image|>s of its frames

B prompts, S tokens, N images in the batch, K learnable queries (an image takes K+1 tokens).
"""

import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import MultiModalData, ProcessorMixin

from owl2.errors import ErrorCode, InputError
from owl2.model.registry import MODEL_TYPES
from owl2.processing import pretrained_files
from owl2.processing.chat_template import (
    RENDER_OPTIONS,
    Spans,
    render,
    select_template,
    template_variables,
)
from owl2.processing.default_templates import CHAT_TEMPLATES
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.labeling import assistant_masks, encode_labeled
from owl2.processing.message_parts import IMAGE_TOKEN, VIDEO_TOKEN
from owl2.processing.messages import ParsedMessages, order_images, parse_messages, validate_prompt
from owl2.processing.prepared_prompt import PreparedPrompt, check_length, expand_media, video_frames
from owl2.processing.token_rows import make_batch
from owl2.processing.tokenizer import add_image_token, encode, start_ids
from owl2.processing.video import DEFAULT_NUM_FRAMES, requested_num_frames


class Owl2Processor(ProcessorMixin):
    """Messages, prompts and images to the model's inputs, and ids to text.

    The conventions are those of transformers' `ProcessorMixin`: options of the tokenizer and the
    image processor are keyword arguments, flat or in `text_kwargs` and `images_kwargs`.

    Args:
        chat_template: A Jinja template, or a name in `CHAT_TEMPLATES`. Default: Specification §1.5.
        num_image_tokens: Tokens of an image, K+1.
        image_token_id: Id of `<|image|>` for a tokenizer without this token. Default:
            `len(tokenizer)`.
        image_newline: Separate the images that start a user turn from its text by one line break,
            as training does. It is saved; the released checkpoint has none.
        interleave_images: Keep the places of images between texts. Otherwise the images of a user
            turn precede its text, as in the training of mPLUG-Owl2, except for `<|image|>` in a
            text. It is saved.
        num_frames: Of a video. It is saved unless it is the default.

    Attributes:
        start_ids: Ids at the start of a prompt, such as that of `<s>`.
    """

    tokenizer: Any
    image_processor: Any
    image_token = IMAGE_TOKEN
    video_token = VIDEO_TOKEN
    return_mm_token_type_ids = True
    return_text_replacement_offsets = False

    def __init__(
        self,
        image_processor: Owl2ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        num_image_tokens: int = 65,
        image_token_id: int | None = None,
        image_newline: bool = False,
        interleave_images: bool = False,
        num_frames: int = DEFAULT_NUM_FRAMES,
    ) -> None:
        template: Any = chat_template or "mplug_owl2"
        if isinstance(template, str):
            template = CHAT_TEMPLATES.get(template, template)
        super().__init__(image_processor, tokenizer, chat_template=template)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"  # for generation
        self.image_newline = image_newline
        self.interleave_images = interleave_images
        self.num_frames = num_frames
        self.num_image_tokens = num_image_tokens
        self.image_token_id = add_image_token(tokenizer, image_token_id)
        if tokenizer.pad_token is None:  # `pad` requires one; the mask makes its id irrelevant
            tokenizer.pad_token = tokenizer.eos_token
        self.start_ids = start_ids(tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        pixels = self.image_processor.model_input_names
        return ["input_ids", "attention_mask", "mm_token_type_ids", *pixels]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts with `<|image|>` and `<|video|>` and their images and videos to model inputs.

        Args:
            images: In order of appearance: one list for all prompts, or a list for each prompt.
            videos: Likewise. A video is a path, a URL, a data URI or bytes, of which `num_frames`
                are used, or a list or an array (T, ...) of the frames to use. Without `text`, its
                frames are the images.
            kwargs: `num_frames`, `padding`, `padding_side`, `max_length`, `truncation`,
                `return_tensors`, ... and options of `Owl2ImageProcessor`. `truncation` removes
                text, but no image.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 image), all (B,S), and
            `pixel_values` (N,3,size,size), absent without images.

        Raises:
            InputError: The numbers of placeholders and images differ, an image cannot be read or
                would be truncated, an option is invalid, or prompts of different lengths are
                requested as tensors without padding.
        """
        if kwargs.pop("audio", None) is not None:
            raise InputError("The model has no input for audio.", ErrorCode.UNSUPPORTED)
        try:
            kinds: Any = self.valid_processor_kwargs
            options = self._merge_kwargs(kinds, self.tokenizer.init_kwargs, **kwargs)
            num_frames = requested_num_frames(options["videos_kwargs"], self.num_frames)
            if text is None and videos is not None:
                images = video_frames(videos, num_frames)
            if text is None and images is not None:
                pixels: BatchFeature = self.image_processor(images, **options["images_kwargs"])
                return pixels
            texts = [text] if isinstance(text, str) else text
            return self._prepare(texts, images, videos, num_frames, options)
        except InputError:
            raise
        except (ValueError, StrictDataclassError) as error:  # an invalid option, different lengths
            raise InputError(
                f"The inputs cannot be prepared: {error}", ErrorCode.INVALID_VALUE
            ) from error

    def _prepare(
        self, texts: Any, images: Any, videos: Any, num_frames: int, options: dict[str, Any]
    ) -> BatchFeature:
        texts = list(texts or ())
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise InputError(
                "`text` must be a prompt or a non-empty list of strings.", ErrorCode.INVALID_TYPE
            )
        prompts: list[tuple[str, Spans]] = [(prompt, []) for prompt in texts]
        prompts, images = expand_media(self.image_processor, prompts, images, videos, num_frames)
        texts = [text for text, _ in prompts]
        text_options = options["text_kwargs"]
        # transformers < 5.20 has these in the options of the text.
        wants_types, wants_offsets = (
            options.get(name, text_options.pop(name, getattr(self, name)))
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )
        rows = [
            self.prompt_ids(prompt, text_options.get("add_special_tokens") is not False)
            for prompt in texts
        ]
        data = make_batch(rows, text_options, self.tokenizer, self.start_ids, self.image_token_id)
        if wants_types:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if wants_offsets:
            num_tokens = sum(prompt.count(IMAGE_TOKEN) for prompt in texts)
            expanded = [self.replace_image_token({}, index) for index in range(num_tokens)]
            data["text_replacement_offsets"] = self.get_text_with_replacements(texts, expanded)[1]
        if images:
            data |= self.image_processor(images, **options["images_kwargs"])
        return BatchFeature(
            data,
            tensor_type=text_options.get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The text of the tokens of an image."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """The numbers of tokens and of squares for images of any sizes."""
        if image_sizes is None:
            return MultiModalData()
        count_squares = self.image_processor.count_squares
        counts = [count_squares(width, height) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens * tokens for tokens, _ in counts],
            num_image_patches=[squares for _, squares in counts],
        )

    def prompt_ids(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with K+1 × `image_token_id` for every `<|image|>`."""
        image, num_ids = self.image_token_id, self.num_image_tokens
        encoded = encode(self.tokenizer, prompt)
        ids = [id_ for id_ in encoded for _ in range(num_ids if id_ == image else 1)]
        if add_special_tokens and ids[: len(self.start_ids)] != self.start_ids:
            return self.start_ids + ids
        return ids

    def apply_chat_template(  # type: ignore[override]  # options in kwargs
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation (or a list of conversations), as in transformers.

        Args:
            chat_template: Another template, or a name in a `chat_template` with several.
            tokenize: Return ids, or with `return_dict` the `BatchFeature` of `__call__` including
                images. False returns text.
            return_assistant_tokens_mask: Add `assistant_masks` (B,S), 1 for tokens of answers.
            processor_kwargs: Arguments of `__call__`; `images` and `videos` are those of the parts
                without a source.
            kwargs: `add_generation_prompt`, `continue_final_message`, `tools`, `documents`,
                `interleave_images` instead of the processor's, variables of the template, and
                arguments of `__call__`.

        Raises:
            InputError: See `parse_messages`, `render` and `__call__`.
        """
        template = select_template(self.chat_template, chat_template)
        names = template_variables(template) | RENDER_OPTIONS
        variables = {name: value for name, value in kwargs.items() if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        options |= processor_kwargs or {}
        first = next(iter(conversation), None) if isinstance(conversation, (list, tuple)) else None
        is_batch = isinstance(first, (list, tuple))
        conversations = [
            parse_messages(messages, merge_roles=True)
            for messages in (conversation if is_batch else [conversation])
        ]
        variables["return_assistant_tokens_mask"] = return_assistant_tokens_mask
        rendered = [self.render_conversation(item, template, **variables) for item in conversations]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if is_batch else texts[0]
        for name in ("images", "videos"):
            given = options.get(name)
            if given is None or (isinstance(given, (list, tuple)) and not given):
                options[name] = [list(getattr(item, name)) for item in conversations]
        inputs = self(text=texts, **options)
        if return_assistant_tokens_mask:
            rows = inputs["attention_mask"]
            inputs["assistant_masks"] = assistant_masks(self, rendered, rows, options)
            inputs.convert_to_tensors(options.get("return_tensors"))
        return inputs if return_dict else inputs["input_ids"]

    def encode(
        self, messages: Any, /, max_length: int | None = None, **variables: Any
    ) -> PreparedPrompt:
        """The prompt for the answer to a conversation: messages are parsed and images read once.

        Args:
            max_length: The context. A prompt that leaves no token for the answer is an error, if
                possible before its images and videos are decoded.
            variables: `interleave_images` and `num_frames`, instead of the processor's; variables
                of the chat template; `continue_final_message`: the answer continues the last one.

        Raises:
            InputError: See `validate_prompt`; an image cannot be read; or the prompt is too long.
        """
        is_continued = bool(variables.get("continue_final_message"))
        parsed = validate_prompt(messages, is_continued)
        template = select_template(self.chat_template)
        names = template_variables(template) | {"interleave_images", "continue_final_message"}
        options = {name: value for name, value in variables.items() if name in names}
        options["add_generation_prompt"] = not is_continued
        text, _ = self.render_conversation(parsed, template, **options)
        num_frames = variables.get("num_frames", self.num_frames)
        media = [parsed.images], [parsed.videos]
        expanded, images = expand_media(self.image_processor, [(text, [])], *media, num_frames)
        ids = self.prompt_ids(expanded[0][0])
        sizes = self.image_token_id, self.num_image_tokens
        if max_length is not None:
            check_length(ids, max_length, *sizes)  # before images are decoded
        found = self.image_processor(images) if images else {}
        pixels = found.get("pixel_values"), *sizes, found.get("image_grids")
        return PreparedPrompt.from_ids(ids, *pixels, is_continued=is_continued)

    def for_training(
        self, messages: Any, max_length: int | None = None, return_pixel_values: bool = True
    ) -> BatchFeature:
        """A conversation that ends with an answer as a batch of one.

        Args:
            max_length: Truncate longer samples on the right, which can remove all labels.
            return_pixel_values: False for a check that computes no pixels. Images are opened only
                if the number of their tokens depends on their sizes.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels`, all (1,S), and
            `pixel_values` (N,3,size,size), absent without images. `labels` are the ids in the
            template's generation blocks (the answers and their end tokens), -100 elsewhere.

        Raises:
            InputError: See `parse_messages` and `__call__`; an image is beyond `max_length`.
        """
        sample, images = encode_labeled(self, parse_messages(messages), requires_images=True)
        data = sample.to_batch(self.image_token_id, max_length)
        if images and return_pixel_values:
            data.update(self.image_processor(images))
        return BatchFeature(data)

    def render_conversation(
        self, conversation: ParsedMessages, template: str | None = None, **options: Any
    ) -> tuple[str, Spans]:
        """The text of a conversation and the spans of its answers, see `render`."""
        interleave = options.pop("interleave_images", None)
        interleave = self.interleave_images if interleave is None else interleave
        turns = order_images(conversation, interleave)
        template = template or select_template(self.chat_template)
        tokens = self.tokenizer.special_tokens_map
        return render(turns, template, tokens, self.image_newline, **options)

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

    def to_dict(self) -> dict[str, Any]:
        """The content of `processor_config.json`; the id of the image token is the tokenizer's."""
        values: dict[str, Any] = super().to_dict()
        del values["image_token_id"]
        if values["num_frames"] == DEFAULT_NUM_FRAMES:
            del values["num_frames"]
        return values

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the files of the tokenizer, the image processor, the processor and the template.

        `preprocessor_config.json` repeats the options of the image processor, for other programs.
        """
        pretrained_files.write_image_options(self.image_processor, Path(save_directory))
        files: list[str] = super().save_pretrained(str(save_directory), push_to_hub, **kwargs)
        return files

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the same arguments in kwargs
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "Owl2Processor":
        """The processor of a checkpoint, a directory or a hub id.

        Args:
            kwargs: Arguments of this class, `Owl2ImageProcessor` and the tokenizer, instead of the
                checkpoint's; `revision`, `token`, `cache_dir`, `local_files_only`, ..., as in
                transformers. `use_fast` and `backend` have no effect.

        Raises:
            InputError: A file is missing or invalid.
        """
        given = {key: value for key, value in kwargs.items() if value is not None}
        own = {key: given.pop(key) for key in signature(cls).parameters if key in given}
        settings = pretrained_files.read_processor(str(pretrained_model_name_or_path), given)
        return cls(**settings | own)


for parts in MODEL_TYPES.values():
    config, image_processor = parts.load("config"), parts.load("image_processor")
    AutoProcessor.register(config, Owl2Processor, exist_ok=True)
    # One class for all backends, because the pixels must be those of Pillow.
    backends = dict.fromkeys(("pil", "torchvision"), image_processor)
    AutoImageProcessor.register(config, image_processor_classes=backends, exist_ok=True)
