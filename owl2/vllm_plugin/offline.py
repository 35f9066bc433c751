"""Offline inference with vLLM in this process, for millions of images.

conversations ──in windows──► prompts and resized images ──vLLM──► answers
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from owl2.engine.engine import Messages
from owl2.engine.sampling import SamplingParams
from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import parse_messages, validate_prompt
from owl2.processing.image_io import load_image
from owl2.processing.processor import Owl2Processor

# Conversations per call of vLLM: enough to hide the time of the last ones to finish.
WINDOW = 1024

Prompt = dict[str, Any]  # vLLM's prompt with token ids


def answer_all(
    model: str | Path,
    conversations: Iterable[Messages],
    options: dict[str, Any] | None = None,
    *,
    window: int = WINDOW,
    **settings: Any,
) -> Iterator[str | InputError]:
    """Answer each conversation, in order. Greedy answers equal those of `Engine.batch`.

    Args:
        model: The directory or hub id of a checkpoint.
        conversations: Messages that end with a question. They are read lazily, up to two windows
            ahead.
        options: Sampling parameters, as for `Engine.chat`.
        window: The number of conversations per call of vLLM.
        settings: Arguments of vLLM's `LLM`, such as ``dtype`` or ``tensor_parallel_size``.

    Yields:
        The text, or the `InputError` of an invalid conversation.

    Raises:
        InputError: vLLM is not installed, the checkpoint does not exist, or an option is invalid.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f"Cannot import vLLM ({error}). Install it in a separate environment: "
            "pip install 'owl2-vlm[vllm]'",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    processor = Owl2Processor.from_pretrained(model)
    decoding = SamplingParams.from_options(_defaults(model), **(options or {}))
    llm = LLM(str(model), **settings)
    context = int(llm.llm_engine.model_config.max_model_len)
    first = 0
    try:
        for prompts in _windows(processor, conversations, context, window):
            asked = [number for number, prompt in enumerate(prompts) if isinstance(prompt, dict)]
            sampling = [_sampling(decoding, first + number) for number in asked]
            given = [prompts[number] for number in asked]
            outputs = llm.generate(given, sampling, use_tqdm=False) if given else []
            texts = iter([_text(processor, output.outputs[0]) for output in outputs])
            for prompt in prompts:
                yield prompt if isinstance(prompt, InputError) else next(texts)
            first += len(prompts)
    finally:
        llm.llm_engine.engine_core.shutdown()  # ends its processes and frees their memory


def _windows(
    processor: Owl2Processor, conversations: Iterable[Messages], context: int, window: int
) -> Iterator[list[Prompt | InputError]]:
    """Windows of prompts. The images of the next window are loaded while one is answered."""
    remaining = iter(conversations)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:

        def begin() -> list[Future[Prompt | InputError]]:
            some = islice(remaining, window)
            return [pool.submit(_prompt, processor, messages, context) for messages in some]

        ahead = begin()
        while ahead:
            prompts = [prompt.result() for prompt in ahead]
            ahead = begin()
            yield prompts


def _defaults(model: str | Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # the checkpoint has no generation_config.json
        return GenerationConfig()


def _prompt(processor: Owl2Processor, messages: Messages, context: int) -> Prompt | InputError:
    """The prompt of a conversation, or the error in it."""
    from owl2.vllm_plugin.tokenizer import encode_prompt  # imports vLLM

    try:
        validate_prompt(messages)
        conversation = parse_messages(messages)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = encode_prompt(processor, text)
        if (placeholders := ids.count(processor.image_token_id)) != len(conversation.images):
            raise InputError(
                f"The prompt has {placeholders} placeholder(s) for {len(conversation.images)} "
                "image(s).",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        length = len(ids) + placeholders * (processor.num_image_tokens - 1)
        if length >= context:
            raise InputError(
                f"The prompt has {length} tokens; the context of {context} tokens includes at "
                "least one for the answer.",
                ErrorCode.TOO_LONG,
            )
        # Squares of the model's image size are small to transfer to vLLM's processes, and the image
        # processor does not change them.
        pixels = processor.image_processor
        images = [
            pixels.to_square(load_image(image, pixels.max_pixels)) for image in conversation.images
        ]
    except InputError as error:
        return error
    prompt: Prompt = {"prompt_token_ids": ids}
    return prompt | {"multi_modal_data": {"image": images}} if images else prompt


def _sampling(params: SamplingParams, index: int) -> Any:
    import vllm

    chosen: dict[str, Any] = {"temperature": 0}
    if params.do_sample:
        names = ("temperature", "top_p", "top_k", "min_p")
        chosen = {name: getattr(params, name) for name in names}
        chosen["seed"] = None if params.seed is None else params.seed + index
    return vllm.SamplingParams(max_tokens=params.max_new_tokens, detokenize=False, **chosen)


def _text(processor: Owl2Processor, answer: Any) -> str:
    """The text as `Engine` decodes it: vLLM omits incomplete characters."""
    ids = list(answer.token_ids)
    if answer.finish_reason == "stop":  # by an end token, because no stop strings are set
        ids.pop()
    text = processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
