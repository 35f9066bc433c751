"""The checkpoint's tokenizer as vLLM wants it: prompts with `<|image|>` → ids.

vLLM tokenises a prompt before it looks at the images, and each image's one token then becomes
its K + 1 places. So here `<|image|>` is one id, `image_token_id`, just past the vocabulary; the
text between is tokenised piece by piece, as the model was trained (SPEC 1.5). The places get an id
of the vocabulary (`processing.PLACE_ID`): a placeholder without an image is left as what it is,
out of the vocabulary, and vLLM refuses it.
"""

import copy
from pathlib import Path
from typing import Any

from transformers import BatchEncoding
from vllm.tokenizers.hf import get_cached_tokenizer

from owl2.processing.chat_template import IMAGE_TOKEN
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import encode, start_ids


def encode_prompt(processor: Owl2Processor, prompt: str, add_special_tokens: bool = True) -> list:
    """A prompt's ids, one `image_token_id` for each image.

    With `<s>` in front if the tokenizer has such a start and it is asked for, or written there;
    once.
    """
    tokenizer = processor.tokenizer
    start = start_ids(tokenizer)
    written = "".join(tokenizer.convert_ids_to_tokens(start))
    if start and prompt.startswith(written):
        prompt, add_special_tokens = prompt[len(written) :], True
    ids = list(start) if add_special_tokens else []
    for number, piece in enumerate(prompt.split(IMAGE_TOKEN)):
        if number:
            ids.append(processor.image_token_id)
        ids += encode(tokenizer, piece)
    return ids


class Owl2PromptTokenizer:
    """What vLLM's tokenizer mode `owl2` names; makes tokenizers, and is none itself."""

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
        """The tokenizer of a checkpoint, of its own class with the methods that vLLM calls changed.

        Raises:
            InputError: the directory or hub id has none.
        """
        hub = {"revision": revision, "cache_dir": download_dir}
        given = {name: value for name, value in hub.items() if value is not None}
        return get_cached_tokenizer(_load(str(name_or_path), truncation_side, given))


def _load(name: str, truncation_side: str, hub: dict[str, Any]) -> Any:
    processor = Owl2Processor.from_pretrained(name, **hub)
    # A class of its own for each, as vLLM does it: its kinds of decoding ask for the tokenizer's.
    base: Any = type(processor.tokenizer)

    class PromptTokenizer(base):
        is_fast = False  # that is: it does not tell tokens' places in a text with images

        def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
            ids = encode_prompt(processor, text, add_special_tokens)
            most = options.get("max_length")
            if not options.get("truncation") or most is None or len(ids) <= most:
                return ids
            return ids[len(ids) - most :] if self.truncation_side == "left" else ids[:most]

        def __call__(self, text: str | list[str], **options: Any) -> BatchEncoding:
            many = [text] if isinstance(text, str) else text
            rows: list[Any] = [self.encode(prompt, **options) for prompt in many]
            mask: list[Any] = [[1] * len(row) for row in rows]
            if isinstance(text, str):
                rows, mask = rows[0], mask[0]
            return BatchEncoding({"input_ids": rows, "attention_mask": mask})

        def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
            """As the tokenizer's own, and the start written out: vLLM adds none to a chat."""
            tokenize = options.pop("tokenize", True)
            text = super().apply_chat_template(conversation, *args, tokenize=False, **options)
            start = "".join(self.convert_ids_to_tokens(start_ids(processor.tokenizer)))
            text = text if text.startswith(start) else start + text
            return self.encode(text, add_special_tokens=False) if tokenize else text

        def __copy__(self) -> Any:
            # Python's own would go through `__reduce__` and read the files again.
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
