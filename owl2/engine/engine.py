"""The engine: load a model once, answer and score any number of prompts.

::

    messages ──Owl2Processor.encode──► PreparedPrompt: ids, pixel_values
    ──EngineCore, together with all other requests──► token ids
    ──OutputProcessor──► text

Calls do not change the answers of later calls.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from owl2.engine import hf_generate, offline
from owl2.engine.detokenizer import IncrementalDetokenizer, open_byte_ids, token_texts
from owl2.engine.engine_core import EngineCore
from owl2.engine.load_model import ModelArgs, check_processor
from owl2.engine.logits_processors import check_logits_processors
from owl2.engine.output import Abort, Completion, CompletionChunk, OnOutput, OutputProcessor
from owl2.engine.prefix_cache import PromptState
from owl2.engine.running_batch import EngineStats, PrefillOutput
from owl2.engine.sampling import SamplingParams, check_generation_config, end_ids
from owl2.engine.scheduler import Request
from owl2.engine.scoring import group_choices, score_answers
from owl2.engine.structured_output import GrammarCompiler
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.messages import Message, ParsedMessages
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.processing.processor import Owl2Processor

MAX_NUM_SEQS = 128  # running requests if memory allows; more do not increase the throughput

Messages = Sequence[Message]
Prompt = Messages | ParsedMessages | PreparedPrompt  # the input of chat, batch, stream and complete


class Engine:
    """A model and its processor, for any number of threads.

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

    Attributes:
        core: None if the model's weights are not all on one device, or `synced_gpus`.
        end_ids: The tokens that end an answer.

    Raises:
        InputError: Model and processor do not fit, or the checkpoint's `generation_config` has
            invalid or unsupported options.
    """

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        processor: Owl2Processor,
        *,
        enable_prefix_caching: bool = False,
        max_num_batched_tokens: int | None = None,
        synced_gpus: bool = False,
    ) -> None:
        check_processor(model, processor)
        self.model = model.eval()
        self.processor = processor
        self.synced_gpus = synced_gpus
        self.core: EngineCore | None = None
        if not synced_gpus and hf_generate.is_on_one_device(model):
            self.core = EngineCore(
                model,
                max_num_seqs=MAX_NUM_SEQS,
                enable_prefix_caching=enable_prefix_caching,
                max_num_batched_tokens=max_num_batched_tokens,
            )
        self.end_ids = end_ids(model.generation_config, processor.tokenizer)
        self._open_ids = open_byte_ids(processor.tokenizer)
        self._token_text = token_texts(processor.tokenizer)
        self._grammars = GrammarCompiler(self._token_text, model.config.vocab_size, self.end_ids)
        check_generation_config(model.generation_config)
        try:
            self.sampling_params()
        except InputError as error:
            raise InputError(f"The checkpoint's generation_config: {error}", error.code) from error

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        enable_prefix_caching: bool = True,
        max_num_batched_tokens: int | None = None,
        **options: Any,
    ) -> "Engine":
        """The engine of a checkpoint.

        Args:
            name_or_path: A directory or a hub id.
            device, dtype: Default: the best; see `ModelArgs`.
            enable_prefix_caching, max_num_batched_tokens: See `Engine`.
            options: The other fields of `ModelArgs`.

        Raises:
            InputError: The checkpoint cannot be loaded.
        """
        args = ModelArgs(name_or_path, device, dtype, **options)
        model, processor = args.load_model(), args.load_processor()
        return cls(
            model,
            processor,
            enable_prefix_caching=enable_prefix_caching,
            max_num_batched_tokens=max_num_batched_tokens,
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
        """Counts of requests and of what was computed.

        Raises:
            InputError: The model's weights are on several devices.
        """
        return self._require_core("stats").stats()

    # -------------------------------------------------------------- answers

    def chat(self, messages: Prompt, **options: Any) -> str:
        """The answer to a conversation that ends with a user message.

        Greedy, unless the checkpoint's `generation_config` or an option requests sampling.

        Args:
            options: The fields of `SamplingParams`, without `n` and `top_logprobs`; `stop` may be
                one string.

        Raises:
            InputError: An empty question, an unreadable or missing image, a prompt beyond the
                context, an option out of its range, or logits that are not finite.
        """
        return self.batch([messages], **options)[0]

    def batch(self, list_of_messages: Sequence[Prompt], **options: Any) -> list[str]:
        """`chat` for several conversations together, with any number of images each.

        Conversation i (from 0) has the seed `seed` + i.
        """
        return [output.text for output in self.batch_outputs(list_of_messages, **options)]

    def batch_outputs(self, prompts: Sequence[Prompt], **options: Any) -> list[CompletionChunk]:
        """`batch` with the token counts and finish reasons of the answers."""
        params = self._chat_params(options)
        encoded = []
        for index, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt))
            except InputError as error:
                where = f"Conversation {index}: " if len(prompts) > 1 else ""
                raise InputError(f"{where}{error}", error.code) from error
        return self._complete(encoded, params).outputs()

    def stream(self, messages: Prompt, **options: Any) -> Iterator[str]:
        """The answer of `chat` in chunks, as it is generated.

        The input is checked immediately; the first `next` submits the request. Leaving the loop, or
        `close()`, aborts it.
        """
        params = self._chat_params(options)
        completion = self._complete([self.encode(messages)], params)

        def texts() -> Iterator[str]:
            with completion:
                yield from (chunk.text for chunk in completion if chunk.text)

        return texts()

    def complete(self, messages: Prompt, **options: Any) -> Completion:
        """Answers in chunks, with token counts, finish reasons and log-probabilities.

        The input is checked immediately; the first `next` submits the request.

        Args:
            options: The fields of `SamplingParams`. With a seed, answer i of `n` is what `chat`
                returns for `seed` + i.

        Raises:
            InputError: As `chat`.
        """
        return self._complete([self.encode(messages)], self.sampling_params(**options))

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
        if params.structured_outputs is not None:  # compiles it; `submit` finds it in the cache
            self._grammars.matcher(params.structured_outputs)
        return params

    def encode(self, messages: Prompt, /, **template_kwargs: Any) -> PreparedPrompt:
        """The prompt of a conversation that ends with a user message; its images are read.

        A `PreparedPrompt` is only checked for its ids and its length.

        Args:
            template_kwargs: As of `Owl2Processor.encode`.

        Raises:
            InputError: An empty question, an unreadable or missing image, a token without an
                embedding, or a prompt that leaves no token of the context for the answer.
        """
        prompt = messages
        if not isinstance(prompt, PreparedPrompt):
            prompt = self.processor.encode(messages, **template_kwargs)
        prompt.check_ids(self.model.config)
        self._max_answer_tokens(prompt, SamplingParams())
        return prompt

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
    ) -> list[float]:
        """The log-probability of each choice as the answer: the sum over its tokens.

        The scored tokens are those that training would label: the answer and its end token. The
        prompt is computed once. A score does not depend on the other choices.

        Args:
            include_end: Include the end token. Without it, "red" is not distinguished from the
                start of "red and blue".
            normalize: Return the mean over the scored tokens instead of the sum.
            batch_size: Choices that are computed together.

        Raises:
            InputError: As `chat`; also no choices, or an empty one.
        """
        if isinstance(choices, str) or not choices:
            raise InputError(
                "choices must be a non-empty list of strings.", ErrorCode.INVALID_VALUE
            )
        prompt = self.encode(messages)
        removed = () if include_end else self.end_ids
        scores = [0.0] * len(choices)
        groups = group_choices(self.processor, messages, choices, self.context_length, removed)
        for ids, answers in groups.items():
            own_prompt = prompt.with_ids(ids, self.processor.image_token_id)
            score = partial(score_answers, self.model, list(answers.values()), max(1, batch_size))
            rows: list[torch.Tensor] = self.run_prefilled(own_prompt, score)
            for index, row in zip(answers, rows, strict=True):
                scores[index] = float((row.mean() if normalize else row.sum()).item())
        return scores

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
        """The logits of W tokens after each of B prompts, see `offline.next_token_logits`."""
        return offline.next_token_logits(self, prompts, token_ids)

    # -------------------------------------------------------------- internals

    def _chat_params(self, options: dict[str, Any]) -> SamplingParams:
        if invalid := options.keys() & {"n", "top_logprobs"}:
            raise TypeError(f"unexpected options: {', '.join(sorted(invalid))}; use `complete`")
        return self.sampling_params(**options)

    def _complete(self, prompts: Sequence[PreparedPrompt], params: SamplingParams) -> Completion:
        """n answers to each prompt; those of prompt i have the indices from n * i on."""
        if params.top_logprobs is not None:
            self._require_core("top_logprobs")
        for prompt in prompts:
            self._max_answer_tokens(prompt, params)
        num_tokens = sum(len(prompt.ids) for prompt in prompts)
        submit = partial(self._submit, prompts, params)
        return Completion(num_tokens, params.n * len(prompts), submit)

    def _max_answer_tokens(self, prompt: PreparedPrompt, params: SamplingParams) -> int:
        limit = min(params.max_length or self.context_length, self.context_length)
        if (excess := len(prompt.ids) + 1 - limit) > 0:
            context = "This model's maximum context length is "
            raise InputError(
                f"{context if limit == self.context_length else 'max_length='}{limit} tokens. "
                f"However, the prompt has {len(prompt.ids)} tokens, and the answer needs one: "
                f"{excess} too many. Shorten the text, or remove turns or images.",
                ErrorCode.TOO_LONG,
            )
        return min(params.max_new_tokens, limit - len(prompt.ids))

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
        text_options = decode, self._open_ids, params.stop, params.top_logprobs is not None
        for prompt in prompts:
            limit = self._max_answer_tokens(prompt, params)
            state = PromptState(prompt, self.model.config.ntk_alpha(len(prompt.ids)))
            options = params, limit, params.end_ids(self.end_ids), self.model.device
            for _ in range(params.n):
                requests.append(request := Request(state, *options, len(requests)))
                if params.structured_outputs is not None:
                    request.matcher = self._grammars.matcher(params.structured_outputs)
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
            raise InputError(
                f"{feature} needs all weights of the model on one device.", ErrorCode.UNSUPPORTED
            )
        return self.core

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        # Cleaning up spaces would change text that was released before.
        return str(
            self.processor.decode(ids, skip_special_tokens, clean_up_tokenization_spaces=False)
        )
