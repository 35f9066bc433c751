"""The tokenizer of a checkpoint for vLLM: prompts with `<|image|>` → ids.

vLLM tokenizes a prompt before it processes the images, and then expands the token of each image to
K + 1 positions. `<|image|>` is therefore one id here: `image_token_id`. Each text segment between
images is tokenized separately, as in training (Specification §1.5). The expanded positions get a
valid id (`processing.PLACEHOLDER_ID`). A placeholder without an image keeps its id, which vLLM
rejects because it is not in the vocabulary that vLLM reads from this tokenizer.
"""

import copy
from pathlib import Path
from typing import Any

from transformers import BatchEncoding
from vllm.tokenizers.hf import get_cached_tokenizer

from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import encode, start_ids


def encode_prompt(
    processor: Owl2Processor, prompt: str, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a prompt, with one `image_token_id` for each image.

    The start token `<s>`, if the tokenizer has one, is added once: if `add_special_tokens` is set
    or the prompt starts with it.
    """
    tokenizer = processor.tokenizer
    start = start_ids(tokenizer)
    written = "".join(tokenizer.convert_ids_to_tokens(start))
    if start and prompt.startswith(written):
        prompt, add_special_tokens = prompt[len(written) :], True
    return (list(start) if add_special_tokens else []) + encode(tokenizer, prompt)


class Owl2PromptTokenizer:
    """The factory that vLLM's tokenizer mode `owl2` names."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        download_dir: str | None = None,
        truncation_side: str = "left",
        **_: Any,
    ) -> Any:
        """The tokenizer of a checkpoint, with the methods that vLLM calls overridden.

        Raises:
            InputError: The directory or hub id has no tokenizer.
        """
        hub = {"revision": revision, "cache_dir": download_dir}
        hub = {name: value for name, value in hub.items() if value is not None}
        return get_cached_tokenizer(_load(str(name_or_path), truncation_side, hub))


def _load(name: str, truncation_side: str, hub: dict[str, Any]) -> Any:
    processor = Owl2Processor.from_pretrained(name, **hub)
    # A subclass of each tokenizer's class, as in vLLM: detokenization depends on that class.
    base: Any = type(processor.tokenizer)

    class PromptTokenizer(base):
        is_fast = False  # it does not return offsets for a text with images

        def get_vocab(self) -> dict[str, int]:
            return {name: id_ for name, id_ in super().get_vocab().items() if name != IMAGE_TOKEN}

        def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
            ids = encode_prompt(processor, text, add_special_tokens)
            max_length = options.get("max_length") if options.get("truncation") else None
            if max_length is None:
                return ids
            excess = max(0, len(ids) - max_length)
            return ids[excess:] if self.truncation_side == "left" else ids[:max_length]

        def __call__(self, text: str | list[str], **options: Any) -> BatchEncoding:
            if isinstance(text, str):
                ids = self.encode(text, **options)
                return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
            rows = [self.encode(prompt, **options) for prompt in text]
            mask = [[1] * len(row) for row in rows]
            return BatchEncoding({"input_ids": rows, "attention_mask": mask})

        def apply_chat_template(
            self,
            conversation: Any,
            *args: Any,
            interleave_images: bool | None = None,  # named, because vLLM drops other options
            **options: Any,
        ) -> Any:
            """As the processor, with the start token, which vLLM omits in a chat."""
            tokenize = options.pop("tokenize", True)
            options["interleave_images"] = interleave_images
            text = str(processor.apply_chat_template(conversation, *args, **options))
            start = "".join(self.convert_ids_to_tokens(start_ids(processor.tokenizer)))
            text = text if text.startswith(start) else start + text
            return self.encode(text, add_special_tokens=False) if tokenize else text

        def __copy__(self) -> Any:
            # The default would call `__reduce__` and read the files again.
            shallow: Any = object.__new__(type(self))
            vars(shallow).update(vars(self))
            return shallow

        def __reduce__(self) -> Any:
            return _load, (name, truncation_side, hub)

    tokenizer: Any = copy.copy(processor.tokenizer)
    tokenizer.__class__ = PromptTokenizer
    tokenizer.name_or_path = name
    tokenizer.truncation_side = truncation_side
    tokenizer.chat_template = processor.chat_template
    return tokenizer
