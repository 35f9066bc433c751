"""The engine: load a model once, answer and score any number of prompts.

::

    messages ──Owl2Processor.encode──► PreparedPrompt: ids, pixel_values
    ──EngineCore, together with all other requests──► token ids
    ──OutputProcessor──► text
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from owl2.engine import hf_generate, offline, scoring
from owl2.engine.detokenizer import IncrementalDetokenizer, open_byte_ids, token_texts
from owl2.engine.engine_core import EngineCore
from owl2.engine.load_model import ModelArgs, adapter_processors, check_processor
from owl2.engine.logits_processors import check_logits_processors
from owl2.engine.lora import LoraManager, find_adapters
from owl2.engine.output import Abort, Completion, CompletionChunk, OnOutput, OutputProcessor
from owl2.engine.prompt_state import PromptState
from owl2.engine.running_batch import EngineStats, PrefillOutput
from owl2.engine.sampling_params import SamplingParams, check_generation_config, end_ids
from owl2.engine.scheduler import Request
from owl2.engine.structured_output import GrammarCompiler
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.messages import Message, ParsedMessages
from owl2.processing.prepared_prompt import PreparedPrompt, check_length
from owl2.processing.processor import Owl2Processor
from owl2.registry import look_up

MAX_NUM_SEQS = 128  # running requests if memory allows; more do not increase the throughput

Messages = Sequence[Message]
Adapters = str | Sequence[str | None] | None  # one for all prompts, or one for each
Prompt = Messages | ParsedMessages | PreparedPrompt  # the input of chat, batch, stream and complete


class Engine:
    """A model and its processor, for any number of threads. Calls are independent of each other.

    Args:
        model: On its device and in its dtype.
        processor: Of the same checkpoint.
        enable_prefix_caching: Cache image features, and keys and values of prompts, across calls,
            so that further questions about an image and in a conversation cost little.
            The caches are cleared when weights change in a way that autograd tracks; after other
            changes, call `clear_cache`. False is the default for models that are being trained.
        max_num_batched_tokens: See `EngineCore`.
        synced_gpus: As in transformers' `generate`: True where processes share the weights of one
            model.
        adapters: LoRA adapters, directories or hub ids by the names that the methods take as
            `adapter`. One batch can mix adapters and the base model.

    Attributes:
        adapters: The names of the adapters.
        core: None if the model's weights are not all on one device, or `synced_gpus`.
        end_ids: The tokens that end an answer.

    Raises:
        InputError: Model and processor do not fit, the checkpoint's `generation_config` has
            invalid or unsupported options, or an adapter does not fit the model.
    """

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        processor: Owl2Processor,
        *,
        enable_prefix_caching: bool = False,
        max_num_batched_tokens: int | None = None,
        synced_gpus: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        check_processor(model.config, processor)
        self.model = model.eval()
        self.processor = processor
        manager = LoraManager(model, find_adapters(adapters or {}))
        self.adapters = manager.names
        self._processors = adapter_processors(model, processor, adapters or {})
        self.synced_gpus = synced_gpus
        self.core: EngineCore | None = None
        if not synced_gpus and hf_generate.is_on_one_device(model):
            self.core = EngineCore(
                model,
                max_num_seqs=MAX_NUM_SEQS,
                enable_prefix_caching=enable_prefix_caching,
                max_num_batched_tokens=max_num_batched_tokens,
                adapters=manager,
            )
        if self.adapters:
            self._require_core("adapters")
        self.end_ids = end_ids(model.generation_config, processor.tokenizer)
        # Cleaning up spaces would change text that was released before.
        self._decode = partial(processor.decode, clean_up_tokenization_spaces=False)
        self._open_ids = open_byte_ids(processor.tokenizer)
        self._token_text = token_texts(processor.tokenizer)
        self._grammars = GrammarCompiler(self._token_text, model.config.vocab_size, self.end_ids)
        check_generation_config(model.generation_config)
        with error_prefix("The checkpoint's generation_config: "):
            self.sampling_params()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        enable_prefix_caching: bool = True,
        max_num_batched_tokens: int | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> "Engine":
        """The engine of a checkpoint.

        Args:
            name_or_path: A directory or a hub id.
            device, dtype: Default: the best; see `ModelArgs`.
            enable_prefix_caching, max_num_batched_tokens, adapters: See `Engine`.
            options: The other fields of `ModelArgs`.

        Raises:
            InputError: The checkpoint cannot be loaded.
        """
        args = ModelArgs(name_or_path, device, dtype, **options)
        if adapters:
            args.check_adapters(adapters)
        return cls(
            args.load_model(),
            args.load_processor(),
            enable_prefix_caching=enable_prefix_caching,
            max_num_batched_tokens=max_num_batched_tokens,
            adapters=adapters,
        )

    @property
    def context_length(self) -> int:
        """The maximum number of tokens of prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    def clear_cache(self) -> None:
        """Clear the caches before the next prompt, after a change of the weights."""
        if self.core is not None:
            self.core.clear_cache()

    def stats(self) -> EngineStats:
        """Counts of requests, prompts, images and steps.

        Raises:
            InputError: The model's weights are on several devices.
        """
        return self._require_core("stats").stats()

    # -------------------------------------------------------------- answers

    def chat(self, messages: Prompt, adapter: str | None = None, **options: Any) -> str:
        """The answer to a conversation that ends with a user message.

        Greedy, unless the checkpoint's `generation_config` or an option requests sampling.

        Args:
            adapter: One of `adapters`; default: the base model.
            options: The fields of `SamplingParams`, without `n` and `top_logprobs`; `stop` may be
                one string.

        Raises:
            InputError: An empty question, an unreadable or missing image, a prompt beyond the
                context, an option out of its range, or logits that are not finite.
        """
        return self.batch([messages], adapter=adapter, **options)[0]

    def batch(
        self, list_of_messages: Sequence[Prompt], adapter: Adapters = None, **options: Any
    ) -> list[str]:
        """`chat` for several conversations together, with any number of images each.

        Conversation i (from 0) has the seed `seed` + i, and its own of several adapters.
        """
        outputs = self.batch_outputs(list_of_messages, adapter=adapter, **options)
        return [output.text for output in outputs]

    def batch_outputs(
        self, prompts: Sequence[Prompt], adapter: Adapters = None, **options: Any
    ) -> list[CompletionChunk]:
        """`batch` with the token counts and finish reasons of the answers."""
        params = self._chat_params(options)
        return self._complete(offline.encode_all(self, prompts, adapter), params).outputs()

    def stream(self, messages: Prompt, adapter: str | None = None, **options: Any) -> Iterator[str]:
        """The answer of `chat` in chunks, as it is generated.

        The input is checked immediately; the first `next` submits the request. Leaving the loop, or
        `close()`, aborts it.
        """
        params = self._chat_params(options)
        completion = self._complete([self.encode(messages, adapter=adapter)], params)

        def texts() -> Iterator[str]:
            with completion:
                yield from (chunk.text for chunk in completion if chunk.text)

        return texts()

    def complete(self, messages: Prompt, adapter: str | None = None, **options: Any) -> Completion:
        """Answers in chunks, with token counts, finish reasons and log-probabilities.

        The input is checked immediately; the first `next` submits the request.

        Args:
            adapter: See `chat`.
            options: The fields of `SamplingParams`. With a seed, answer i of `n` is what `chat`
                returns for `seed` + i.

        Raises:
            InputError: As `chat`.
        """
        prompt = self.encode(messages, adapter=adapter)
        return self._complete([prompt], self.sampling_params(**options))

    def sampling_params(self, **options: Any) -> SamplingParams:
        """Options over the defaults of the checkpoint's `generation_config`.

        Raises:
            InputError: A value is out of its range, or options exclude each other.
            TypeError: An unknown option.
        """
        params = SamplingParams.from_options(self.model.generation_config, **options)
        if params.n > MAX_NUM_SEQS:
            raise InputError(
                f"n is {params.n}; the maximum is {MAX_NUM_SEQS}.", ErrorCode.INVALID_VALUE
            )
        check_logits_processors(params, self.model, params.end_ids(self.end_ids))
        self._grammars.matcher(params.structured_outputs)  # `submit` finds it in the cache
        return params

    def encode(
        self, messages: Prompt, /, adapter: str | None = None, **template_kwargs: Any
    ) -> PreparedPrompt:
        """The prompt of a conversation that ends with a user message; its images are read.

        A `PreparedPrompt` is only checked for its ids, its length and its adapter.

        Args:
            adapter: See `chat`. Default: the adapter of a `PreparedPrompt`.
            template_kwargs: See `Owl2Processor.encode`.

        Raises:
            InputError: As `Owl2Processor.encode`; also a token without an embedding.
        """
        prompt = messages
        if not isinstance(prompt, PreparedPrompt):
            options = template_kwargs | {"max_length": self.context_length}
            prompt = self.processor_of(adapter).encode(messages, **options)
        if adapter is not None:
            prompt = replace(prompt, adapter=adapter)
        self.processor_of(prompt.adapter)
        prompt.check_ids(self.model.config)
        check_length(prompt.ids, self.context_length)
        return prompt

    def processor_of(self, adapter: str | None) -> Owl2Processor:
        """The processor of an adapter, or of the base model.

        Raises:
            InputError: The engine does not have the adapter.
        """
        return self.processor if adapter is None else look_up("adapter", adapter, self._processors)

    def submit(self, prompt: PreparedPrompt, params: SamplingParams, on_output: OnOutput) -> Abort:
        """Start `params.n` answers to a prompt, without waiting.

        Args:
            prompt: From `encode`.
            params: From `sampling_params`.
            on_output: Called in the engine's thread with each `CompletionChunk`; the request is
                complete when n chunks had a `finish_reason`. An error ends the request and is
                passed in place of a chunk. The callback must return quickly and must not raise.

        Returns:
            A function that aborts the request before the engine's next step. Any thread may call
            it, also repeatedly. Nothing is passed afterwards, except for a call that is already
            running.

        Raises:
            InputError: The model's weights are on several devices.
        """
        self._require_core("submit")
        return self._submit([prompt], params, on_output)

    # -------------------------------------------------------------- scores

    def score(
        self,
        messages: Messages,
        choices: Sequence[str],
        include_end: bool = True,
        normalize: bool = False,
        batch_size: int = 16,
        adapter: str | None = None,
    ) -> list[float]:
        """The log-probability of each choice as the answer: the sum over its tokens.

        The scored tokens are those that training would label: the answer and its end token. The
        prompt is computed once. A score does not depend on the other choices.

        Args:
            include_end: Include the end token. Without it, "red" is not distinguished from the
                start of "red and blue".
            normalize: Return the mean over the scored tokens instead of the sum.
            batch_size: Choices that are computed together.
            adapter: See `chat`.

        Raises:
            InputError: As `chat`; also no choices, or an empty one.
        """
        rows = scoring.score_choices(self, messages, choices, include_end, batch_size, adapter)
        return [float((row.mean() if normalize else row.sum()).item()) for row in rows]

    def run_prefilled(
        self, prompt: PreparedPrompt, function: Callable[[PrefillOutput], Any]
    ) -> Any:
        """What `function` returns for the prefill of a prompt; see `EngineCore.run_prefilled`."""
        if self.core is not None:
            return self.core.run_prefilled(prompt, function)
        return hf_generate.run_prefilled(self.model, prompt, function)

    def next_token_logits(
        self, prompts: Sequence[PreparedPrompt], token_ids: Sequence[int]
    ) -> torch.Tensor:
        """The logits of W tokens after each of B prompts: (B, W) in float32 on the CPU.

        Nothing is generated. Prompts of several threads are computed together, and the tokens that
        they share at their start only once.

        Raises:
            InputError: A prompt does not fit the model, or logits are not finite.
        """
        return scoring.next_token_logits(self, prompts, token_ids)

    def _chat_params(self, options: dict[str, Any]) -> SamplingParams:
        if invalid := options.keys() & {"n", "top_logprobs"}:
            raise TypeError(f"unexpected options: {', '.join(sorted(invalid))}; use `complete`")
        return self.sampling_params(**options)

    def _complete(self, prompts: Sequence[PreparedPrompt], params: SamplingParams) -> Completion:
        """n answers to each prompt; those of prompt i have the indices from n * i on."""
        if params.top_logprobs is not None:
            self._require_core("top_logprobs")
        for prompt in prompts:
            params.max_answer_tokens(prompt.ids, self.context_length)
        num_tokens = sum(len(prompt.ids) for prompt in prompts)
        submit = partial(self._submit, prompts, params)
        return Completion(num_tokens, params.n * len(prompts), submit)

    def _submit(
        self, prompts: Sequence[PreparedPrompt], params: SamplingParams, on_output: OnOutput
    ) -> Abort:
        requests: list[Request] = []

        def abort() -> None:
            for request in requests:
                request.aborted = True

        def on_end(error: BaseException | None) -> None:
            if error is not None:
                abort()
                on_output(error)

        decode = partial(self._decode, skip_special_tokens=params.skip_special_tokens)
        matcher = self._grammars.matcher(params.structured_outputs)
        text_options = decode, self._open_ids, params.stop, params.top_logprobs is not None
        for prompt in prompts:
            limit = params.max_answer_tokens(prompt.ids, self.context_length)
            state = PromptState(prompt, self.model.config.ntk_alpha(len(prompt.ids)))
            options = params, limit, params.end_ids(self.end_ids), self.model.device
            for _ in range(params.n):
                requests.append(request := Request(state, *options, len(requests)))
                request.matcher = None if matcher is None else matcher.copy()
                detokenizer = IncrementalDetokenizer(*text_options, prompt.continued_id)
                output = OutputProcessor(request, detokenizer, self._token_text, on_output)
                request.on_token, request.on_end = output.process, on_end
        if self.core is not None:
            self.core.submit(requests)
        else:
            hf_generate.generate(self.model, requests, self.synced_gpus)
        return abort

    def _require_core(self, feature: str) -> EngineCore:
        if self.core is None:
            message = f"{feature}: all weights of the model must be on one device."
            raise InputError(message, ErrorCode.UNSUPPORTED)
        return self.core
