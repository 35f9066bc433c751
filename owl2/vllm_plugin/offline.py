"""Offline inference with vLLM in this process, for millions of images.

conversations ──in windows──► prompts and pixels ──vLLM──► answers
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from owl2.checkpoints.config_file import read_config, resolve_checkpoint
from owl2.checkpoints.hf_quantizer import stored_quantization
from owl2.engine.engine import Messages
from owl2.engine.offline import encode_batches
from owl2.engine.sampling_params import SamplingParams, changed_options, check_generation_config
from owl2.errors import ErrorCode, InputError
from owl2.processing.prepared_prompt import PreparedPrompt
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
        InputError: vLLM is not installed; the checkpoint does not exist or is quantized by owl2;
            or an option is invalid.
    """
    LLM = _import_llm()
    model = _find_checkpoint(model)
    processor = Owl2Processor.from_pretrained(model)
    try:
        defaults = GenerationConfig.from_pretrained(model)
    except OSError:  # the checkpoint has no generation_config.json
        defaults = GenerationConfig()
    check_generation_config(defaults)
    params = SamplingParams.from_options(defaults, **(options or {}))
    if unsupported := changed_options(params).keys() - {"do_sample", *VLLM_NAMES}:
        raise InputError(
            f"{', '.join(sorted(unsupported))}: not supported with vLLM, neither as an option nor "
            "in the checkpoint's generation_config.",
            ErrorCode.UNSUPPORTED,
        )
    llm = LLM(model, **settings)
    context = int(llm.llm_engine.model_config.max_model_len)
    dtype = llm.llm_engine.model_config.dtype

    def encode(messages: Messages) -> PreparedPrompt:
        prompt = processor.encode(messages, context)
        if prompt.pixel_values is None:
            return prompt
        # The dtype of the model takes less memory and time to transfer to vLLM's processes.
        return replace(prompt, pixel_values=prompt.pixel_values.to(dtype))

    first = 0
    try:
        for prompts in encode_batches(encode, conversations, window):
            valid: dict[int, PreparedPrompt] = {
                i: one for i, one in enumerate(prompts, first) if isinstance(one, PreparedPrompt)
            }
            inputs: Any = [_vllm_prompt(prompt) for prompt in valid.values()]
            sampling = [_vllm_sampling(params, index) for index in valid]
            outputs = llm.generate(inputs, sampling, use_tqdm=False) if inputs else []
            texts = iter([_text(processor, output.outputs[0]) for output in outputs])
            for prompt in prompts:
                yield prompt if isinstance(prompt, InputError) else next(texts)
            first += len(prompts)
    finally:
        llm.llm_engine.engine_core.shutdown()  # ends its processes and frees their memory


class VllmLogitsEngine:
    """The logits of the next token, as `Engine.next_token_logits`.

    Args:
        model: The directory or hub id of a checkpoint.
        settings: Arguments of vLLM's `LLM`, such as ``dtype``.

    Raises:
        InputError: vLLM is not installed, or the checkpoint does not exist or is quantized by owl2.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        LLM = _import_llm()
        name = _find_checkpoint(model)
        self.processor = Owl2Processor.from_pretrained(name)
        self._llm: Any = LLM(name, logprobs_mode="raw_logits", **settings)

    def next_token_logits(
        self, prompts: Sequence[PreparedPrompt], token_ids: Sequence[int]
    ) -> torch.Tensor:
        """The logits of W tokens after each of B prompts: (B, W) in float32."""
        import vllm

        ids = list(dict.fromkeys(token_ids))
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0, logprob_token_ids=ids, detokenize=False
        )
        inputs: Any = [_vllm_prompt(prompt) for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        return torch.tensor([[row[id_].logprob for id_ in token_ids] for row in rows])

    def close(self) -> None:
        """End the processes of vLLM and free their memory."""
        self._llm.llm_engine.engine_core.shutdown()


def _import_llm() -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f"Cannot import vLLM ({error}). Install it in a separate environment: "
            "pip install 'owl2-vlm[vllm]'",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    return LLM


def _find_checkpoint(model: str | Path) -> str:
    """The directory or hub id of a checkpoint that vLLM can load."""
    name = resolve_checkpoint(model)
    if stored_quantization(read_config(name)) is not None:
        raise InputError(
            f"{model} has weights quantized by `owl2 quantize`, which vLLM cannot read; use the "
            "checkpoint that it was made from",
            ErrorCode.UNSUPPORTED,
        )
    return name


def _vllm_prompt(prompt: PreparedPrompt) -> dict[str, Any]:
    """A prompt with one id for each image."""
    repeated = {i for start, end in prompt.image_spans for i in range(start + 1, end)}
    ids = [id_ for index, id_ in enumerate(prompt.ids) if index not in repeated]
    images = {} if prompt.pixel_values is None else {"image": prompt.pixel_values}
    return {"prompt_token_ids": ids, "multi_modal_data": images}


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
