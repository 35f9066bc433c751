"""Many conversations through vLLM in this process: for millions of images.

conversations ──a window of them──► prompts, small images ──vLLM, all at once──► answers
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

# Conversations handed over at once: enough that the last ones to finish do not count.
WINDOW = 1024

Prompt = dict[str, Any]  # vLLM's


def answer_all(
    model: str | Path,
    conversations: Iterable[Messages],
    options: dict[str, Any] | None = None,
    *,
    window: int = WINDOW,
    **settings: Any,
) -> Iterator[str | InputError]:
    """The answer to each conversation, in order; greedy ones are those of `Engine.batch`.

    Args:
        model: a checkpoint's directory or hub id.
        conversations: messages that end with a question; taken as they are needed, up to two
            windows ahead.
        options: as for `Engine.chat`.
        window: how many conversations vLLM is given at once.
        settings: of vLLM's `LLM` (``dtype``, ``tensor_parallel_size``, ``max_model_len`` ...).

    Yields:
        The text; or the `InputError` of a conversation that cannot be asked, in its place.

    Raises:
        InputError: vLLM is not installed, no such checkpoint, an option out of its range.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be imported ({error}): pip install 'owl2-vlm[vllm]', in an "
            "environment of its own"
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
        llm.llm_engine.engine_core.shutdown()  # its processes, and their memory


def _windows(
    processor: Owl2Processor, conversations: Iterable[Messages], context: int, window: int
) -> Iterator[list[Prompt | InputError]]:
    """Prompts, a window at a time; while one is answered, the next one's images are opened."""
    rest = iter(conversations)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:

        def begin() -> list[Future[Prompt | InputError]]:
            some = islice(rest, window)
            return [pool.submit(_prompt, processor, messages, context) for messages in some]

        ahead = begin()
        while ahead:
            prompts = [prompt.result() for prompt in ahead]
            ahead = begin()
            yield prompts


def _defaults(model: str | Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # it has none
        return GenerationConfig()


def _prompt(processor: Owl2Processor, messages: Messages, context: int) -> Prompt | InputError:
    """What vLLM is given for a conversation; or what is wrong with it."""
    from owl2.vllm_plugin.tokenizer import encode_prompt  # imports vLLM, which may not be there

    try:
        validate_prompt(messages)
        conversation = parse_messages(messages)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = encode_prompt(processor, text)
        if (places := ids.count(processor.image_token_id)) != len(conversation.images):
            raise InputError(
                f"The prompt has {places} placeholders for {len(conversation.images)} images",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        length = len(ids) + places * (processor.num_image_tokens - 1)
        if length >= context:
            raise InputError(
                f"The prompt has {length} tokens; the context is {context}, one of them for the "
                "answer",
                ErrorCode.TOO_LONG,
            )
        # Squares of the model's size: small on their way to vLLM's processes, and what the
        # processor makes of a square of this size is the square.
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
    """An answer's ids as the Engine writes them: vLLM leaves out a character that is not whole."""
    ids = list(answer.token_ids)
    if answer.finish_reason == "stop":  # by an end token, as no stop texts are asked for
        ids.pop()
    text = processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
