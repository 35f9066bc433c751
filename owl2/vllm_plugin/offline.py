"""Offline inference with vLLM in this process, for millions of images.

conversations ──in windows──► prompts and pixels ──vLLM──► answers
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from owl2.checkpoints.config_file import read_config, resolve_checkpoint
from owl2.checkpoints.hf_quantizer import stored_quantization
from owl2.engine.engine import Messages
from owl2.engine.offline import map_batches
from owl2.engine.sampling_params import SamplingParams, changed_options, check_generation_config
from owl2.errors import ErrorCode, InputError
from owl2.processing.prepared_prompt import PreparedPrompt, check_length
from owl2.processing.processor import Owl2Processor

# Conversations per call of vLLM: enough to hide the time of the last ones to finish.
WINDOW = 1024
# The names of the supported options in vLLM's `SamplingParams`.
VLLM_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "ignore_eos": "ignore_eos",
}


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
        InputError: As `VllmEngine`; an option is invalid.
    """
    model = resolve_checkpoint(model)
    params = _sampling_params(model, options or {})
    engine = VllmEngine(model, **settings)

    def encode(item: tuple[int, Messages]) -> tuple[Any, Any]:
        index, messages = item
        prompt = engine.processor.encode(messages, engine.context_length)
        return engine.encode(prompt), _vllm_sampling(params, index)

    def answer(batch: list[tuple[Any, Any]]) -> list[str]:
        prompts, sampling = map(list, zip(*batch, strict=True))
        outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
        return [_text(engine.processor, output.outputs[0]) for output in outputs]

    try:
        yield from map_batches(encode, answer, enumerate(conversations), window)
    finally:
        engine.close()


class VllmEngine:
    """A checkpoint in vLLM. `next_token_logits` is that of `Engine`.

    Args:
        model: The directory or hub id of a checkpoint.
        settings: Arguments of vLLM's `LLM`, such as ``dtype``.

    Raises:
        InputError: vLLM is not installed, or the checkpoint does not exist or is quantized by owl2.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(
                f"Cannot import vLLM ({error}). Install it in a separate environment: "
                "pip install 'owl2-vlm[vllm]'",
                ErrorCode.MISSING_DEPENDENCY,
            ) from error
        name = resolve_checkpoint(model)
        if stored_quantization(read_config(name)) is not None:
            raise InputError(
                f"{model} has weights quantized by `owl2 quantize`, which vLLM cannot read; use "
                "the checkpoint that it was made from",
                ErrorCode.UNSUPPORTED,
            )
        self.processor = Owl2Processor.from_pretrained(name)
        self.llm: Any = LLM(name, logprobs_mode="raw_logits", **settings)
        config = self.llm.llm_engine.model_config
        self.context_length, self._dtype = int(config.max_model_len), config.dtype

    def encode(self, prompt: PreparedPrompt) -> dict[str, Any]:
        """The prompt for vLLM, with one id for each image.

        Raises:
            InputError: The prompt is longer than the context.
        """
        check_length(prompt.ids, self.context_length)
        repeated = {i for start, end in prompt.image_spans for i in range(start + 1, end)}
        ids = [id_ for index, id_ in enumerate(prompt.ids) if index not in repeated]
        images = {}
        if prompt.pixel_values is not None:
            # The dtype of the model takes less memory and time to transfer to vLLM's processes.
            images = {"image": prompt.pixel_values.to(self._dtype)}
        return {"prompt_token_ids": ids, "multi_modal_data": images}

    def next_token_logits(
        self, prompts: Sequence[PreparedPrompt], token_ids: Sequence[int]
    ) -> torch.Tensor:
        """The logits of W tokens after each of B prompts: (B, W) in float32.

        Raises:
            InputError: A prompt is longer than the context.
        """
        import vllm

        ids = list(dict.fromkeys(token_ids))
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0, logprob_token_ids=ids, detokenize=False
        )
        inputs = [self.encode(prompt) for prompt in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        return torch.tensor([[row[id_].logprob for id_ in token_ids] for row in rows])

    def close(self) -> None:
        """End the processes of vLLM and free their memory."""
        self.llm.llm_engine.engine_core.shutdown()


def _sampling_params(model: str, options: dict[str, Any]) -> SamplingParams:
    """Options over the defaults of a checkpoint, all of which vLLM has."""
    try:
        defaults = GenerationConfig.from_pretrained(model)
    except OSError:  # the checkpoint has no generation_config.json
        defaults = GenerationConfig()
    check_generation_config(defaults)
    params = SamplingParams.from_options(defaults, **options)
    if unsupported := changed_options(params).keys() - {"do_sample", *VLLM_NAMES}:
        raise InputError(
            f"{', '.join(sorted(unsupported))}: not supported with vLLM, neither as an option nor "
            "in the checkpoint's generation_config.",
            ErrorCode.UNSUPPORTED,
        )
    return params


def _vllm_sampling(params: SamplingParams, index: int) -> Any:
    import vllm

    options = {other: getattr(params, name) for name, other in VLLM_NAMES.items()}
    if params.do_sample:
        options["seed"] = None if params.seed is None else params.seed + index
    else:
        options |= {"temperature": 0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}
    return vllm.SamplingParams(detokenize=False, **options)


def _text(processor: Owl2Processor, answer: Any) -> str:
    """The text as `Engine` decodes it: vLLM omits incomplete characters."""
    ids = list(answer.token_ids)
    if answer.finish_reason == "stop":  # by an end token, because no stop strings are set
        ids.pop()
    text = processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
