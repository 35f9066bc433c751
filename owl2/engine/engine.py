"""Load once, answer many: chat, stream, batch, complete, score.

::

    messages ──processor──► Prompt: ids (S,), pixel_values (N, 3, H, W)
    ──Runner, with all that waits──► new ids (T,) ──► text

S tokens, N images, T new tokens. From call to call nothing is kept, or what costs time but not
what changes an answer (`reuse`): a second call gives the same as the first.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from owl2.engine import hf_generate
from owl2.engine.detokenizer import TextStream
from owl2.engine.engine_core import Prompt, Runner
from owl2.engine.load_model import load_model
from owl2.engine.output import AnswerInMaking, Completion, Events, check_request
from owl2.engine.prefill import Read
from owl2.engine.sampling import SamplingParams
from owl2.engine.scoring import prompt_and_answer, read_alone, score_answers
from owl2.engine.token_text import TokenTexts
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.chat_template import Message, validate_prompt
from owl2.processing.image_processing import ImagePolicy
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer

# Requests that are answered together if memory allows: far more than any machine gains from.
MAX_BATCH = 128

Messages = Sequence[Message]


class Engine:
    """A model and its processor, answering; from any number of threads at once.

    Args:
        model: on the device and in the dtype it is to run in.
        processor: the same checkpoint's.
        reuse: keep images' features, and prompts' keys and values, from call to call, so that a
            second question about an image and a next turn cost little. Not for a model that is
            being trained: with False, nothing is kept. Changes that autograd sees make it forget
            by itself; after any other, call `forget`.

    Raises:
        InputError: if the two do not fit.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, processor: Owl2Processor, *, reuse: bool = False
    ) -> None:
        for what, ours, theirs in (
            ("image token id", model.config.image_token_id, processor.image_token_id),
            ("tokens an image", model.config.num_image_tokens, processor.num_image_tokens),
            ("image size", model.config.image_size, processor.image_processor.size),
        ):
            if ours != theirs:
                raise InputError(
                    f"Model and processor do not fit: {what} {ours} in the model, {theirs} in the "
                    "processor. Load both from the same checkpoint."
                )
        self.model = model.eval()
        self.processor = processor
        # As `generate` has it: True where several processes share the weights of one model.
        self.synced_gpus: bool | None = None
        self.runner: Runner | None = None
        if hf_generate.is_whole(model):
            self.runner = Runner(model, max_batch=MAX_BATCH, reuse=reuse)
        self._end_ids = _end_ids(model.generation_config, processor)
        self._open_ids = _byte_ids(processor)
        self._token_texts = TokenTexts(processor.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        image_policy: ImagePolicy | None = None,
        max_pixels: int | None = None,
        quantize: str | None = None,
        reuse: bool = True,
    ) -> "Engine":
        """A checkpoint's engine.

        Args:
            name_or_path: a directory or a hub id.
            device: default: cuda, else mps, else cpu.
            dtype: default: what suits the device (`loading.select_dtype`).
            attn_implementation: eager, sdpa or flash_attention_2.
            image_policy: resize or pad, instead of the checkpoint's.
            max_pixels: the largest image to accept, instead of the checkpoint's.
            quantize: 8bit or 4bit: the decoder's weights in fewer bits.
            reuse: keep features, keys and values from call to call; see `Engine`.

        Raises:
            InputError: what cannot be loaded, and why.
        """
        model = load_model(name_or_path, device, dtype, attn_implementation, quantize)
        processor = Owl2Processor.from_pretrained(
            name_or_path, image_policy=image_policy, max_pixels=max_pixels
        )
        return cls(model, processor, reuse=reuse)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer can have together; an image takes K + 1 of them."""
        return int(self.model.config.max_position_embeddings)

    def forget(self) -> None:
        """Keep nothing of earlier calls: what is computed next is computed with the weights as they
        are."""
        if self.runner is not None:
            self.runner.forget()

    # -------------------------------------------------------------- answers

    def chat(self, messages: Messages, *, stop: str | Sequence[str] = (), **options: Any) -> str:
        """The answer to a conversation that ends with a question.

        Greedy, unless the checkpoint's `generation_config` or an option says otherwise.

        Args:
            stop: texts that end the answer; neither they nor what follows are part of it.

        Raises:
            InputError: an empty question, an image that cannot be read or is missing, a prompt
                beyond the context, an option out of its range, logits that are not finite.
        """
        return self.batch([messages], stop=stop, **options)[0]

    def batch(
        self,
        list_of_messages: Sequence[Messages],
        *,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> list[str]:
        """`chat` for several conversations at once, with any number of images each."""
        if not list_of_messages:
            return []
        if stop:  # only who reads an answer as it is made can end it
            completion = self._complete(list_of_messages, 1, stop, None, options)
            return [answer.text for answer in completion.whole()]
        decoding = SamplingParams.from_options(self.model.generation_config, **options)
        prompts, room = self._prompts(list_of_messages)
        limits = [min(decoding.max_new_tokens, tokens) for tokens in room]
        return [
            self._decode(answer).strip() for answer in self._generate(prompts, decoding, limits)
        ]

    def stream(
        self, messages: Messages, *, stop: str | Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """The answer of `chat` in pieces, as it is made; joined, they are exactly that answer.

        The input is checked at once, the model runs when the first piece is asked for. Leaving the
        loop early (or `.close()`) ends the generation.
        """
        return _texts(self._complete([messages], 1, stop, None, options))

    def complete(
        self,
        messages: Messages,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
        top_logprobs: int | None = None,
        **options: Any,
    ) -> Completion:
        """Answers as a server gives them: in pieces, counted, with why they end; see `Completion`.

        The input is checked at once, the model runs when the first piece is asked for.

        Args:
            n: answers. The prompt is computed once for all; with a seed, number i (from 0) is what
                `chat` gives for `seed` + i.
            stop: as in `chat`.
            top_logprobs: None: no log-probabilities; 0: each token's own; up to 20: also those of
                so many of the likeliest in its place.

        Raises:
            InputError: as `chat`.
        """
        return self._complete([messages], n, stop, top_logprobs, options)

    def _complete(
        self,
        list_of_messages: Sequence[Messages],
        n: int,
        stop: str | Sequence[str],
        top: int | None,
        options: dict[str, Any],
    ) -> Completion:
        """n answers to each of several conversations, numbered one conversation after the other."""
        stops = check_request(n, MAX_BATCH, stop, top)
        decoding = SamplingParams.from_options(self.model.generation_config, **options)
        prompts, room = self._prompts(list_of_messages)
        limits = [min(decoding.max_new_tokens, tokens) for tokens in room]
        answers = []
        for index in range(n * len(prompts)):
            stream = TextStream(self._decode, self._open_ids, stops)
            limit = limits[index // n]
            answers.append(AnswerInMaking(index, limit, self._end_ids, stream, self._token_texts))
        events = self._follow(prompts, decoding, limits, n, top)
        return Completion(sum(len(prompt.ids) for prompt in prompts), events, answers)

    # -------------------------------------------------------------- scores

    def score(
        self,
        messages: Messages,
        choices: Sequence[str],
        include_end: bool = True,
        normalise: bool = False,
        batch_size: int = 16,
    ) -> list[float]:
        """How likely each choice is as the answer: the sum of its tokens' log-probabilities.

        Counted is exactly what training would label: the answer and its end token. The prompt with
        its images is computed once for all choices, and a score does not depend on the others.

        Args:
            include_end: count the end token, without which "red" cannot be told from the start of
                "red and blue".
            normalise: the mean over the counted tokens instead of the sum.
            batch_size: choices to compute at a time.

        Raises:
            InputError: as `chat`; also no choices, or an empty one.
        """
        if isinstance(choices, str) or not choices:
            raise InputError("Give the choices to score as a non-empty list of texts.")
        [whole], _ = self._prompts([messages])
        # As long as no choice changes how the prompt is tokenised, there is one group.
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, choice in enumerate(choices):
            prompt, answer = prompt_and_answer(self.processor, messages, choice)
            if len(prompt) + len(answer) > self.context:
                raise InputError(
                    f"With choice {number + 1} the prompt has {len(prompt) + len(answer)} tokens, "
                    f"{len(prompt) + len(answer) - self.context} more than the context of "
                    f"{self.context}."
                )
            if not include_end and len(answer) > 1 and answer[-1] in self._end_ids:
                answer = answer[:-1]
            groups.setdefault(tuple(prompt), []).append((number, answer))
        scores = [0.0] * len(choices)
        for ids, members in groups.items():
            answers = [answer for _, answer in members]
            rows = self._score(Prompt(ids, whole.pixel_values), answers, max(1, batch_size))
            for (number, _), row in zip(members, rows, strict=True):
                scores[number] = float((row.mean() if normalise else row.sum()).item())
        return scores

    def _score(
        self, prompt: Prompt, answers: Sequence[Sequence[int]], batch_size: int
    ) -> list[torch.Tensor]:
        def score(read: Read) -> list[torch.Tensor]:
            return score_answers(self.model, read.logits, read.cache, answers, batch_size)

        if runner := self._runner():
            return runner.read(prompt, score)
        return score_answers(self.model, *read_alone(self.model, *prompt), answers, batch_size)

    # -------------------------------------------------------------- parts

    def _prompts(self, list_of_messages: Sequence[Messages]) -> tuple[list[Prompt], list[int]]:
        """Ids and images of each, and how many tokens of the context each leaves."""
        for number, messages in enumerate(list_of_messages):
            try:
                validate_prompt(messages)
            except InputError as error:
                if len(list_of_messages) == 1:
                    raise
                raise InputError(f"Conversation {number}: {error}", error.code) from error
        inputs = self.processor.apply_chat_template(
            list(list_of_messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        rows = inputs["input_ids"]
        room = [self.context - len(row) for row in rows]
        if min(room) < 1:
            number = room.index(min(room))
            which = f"The prompt of conversation {number}" if len(room) > 1 else "The prompt"
            raise InputError(
                f"{which} has {len(rows[number])} tokens; the model's context is {self.context}, "
                f"one of them for the answer: {1 - room[number]} too many. Use fewer words, turns "
                f"or images (an image takes {self.processor.num_image_tokens}).",
                code=ErrorCode.TOO_LONG,
            )
        tokens = [row.count(self.processor.image_token_id) for row in rows]
        counts = [count // self.processor.num_image_tokens for count in tokens]
        pixels: Any = [None] * len(rows)
        if "pixel_values" in inputs:
            pixels = inputs["pixel_values"].split(counts)
        prompts = [Prompt(tuple(row), own) for row, own in zip(rows, pixels, strict=True)]
        return prompts, room

    def _generate(
        self, prompts: Sequence[Prompt], decoding: SamplingParams, limits: Sequence[int]
    ) -> list[list[int]]:
        """New ids of each, its end token too if it has one."""
        if runner := self._runner():
            return runner.generate(prompts, decoding, limits, self._end_ids)
        return hf_generate.generate(
            self.model, prompts, decoding, limits, self._end_ids, self.synced_gpus
        )

    def _follow(
        self,
        prompts: Sequence[Prompt],
        decoding: SamplingParams,
        limits: Sequence[int],
        n: int,
        top: int | None,
    ) -> Events:
        """The new ids of n answers to each, as they are made."""
        if runner := self._runner():
            return runner.follow(prompts, decoding, limits, self._end_ids, n, top)
        if top is not None:
            raise InputError("top_logprobs needs the whole model on one device; leave it out")
        repeated = [prompt for prompt in prompts for _ in range(n)]
        own_limits = [limit for limit in limits for _ in range(n)]
        return hf_generate.Whole(lambda: self._generate(repeated, decoding, own_limits))

    def _runner(self) -> Runner | None:
        return None if self.synced_gpus else self.runner

    def _decode(self, ids: list[int]) -> str:
        """New ids up to the end token → text, with the white space around it."""
        end = next((place for place, id_ in enumerate(ids) if id_ in self._end_ids), len(ids))
        # No tidying of spaces: it changes text that was streamed already.
        text = self.processor.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _texts(completion: Completion) -> Iterator[str]:
    with completion:
        for piece in completion:
            if piece.text:
                yield piece.text


def _end_ids(defaults: GenerationConfig, processor: Owl2Processor) -> list[int]:
    """What ends an answer: the checkpoint's end tokens, and the one that training labels."""
    given = defaults.eos_token_id
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    own = processor.tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]


def _byte_ids(processor: Owl2Processor) -> frozenset[int]:
    """Byte tokens of tokenizers which decode a run of them together, so that a later one can
    change what an earlier one looked like. SentencePiece itself does not."""
    if isinstance(processor.tokenizer, Owl2Tokenizer):
        return frozenset()
    vocabulary = processor.tokenizer.get_vocab()
    names = (f"<0x{byte:02X}>" for byte in range(256))
    return frozenset(vocabulary[name] for name in names if name in vocabulary)
