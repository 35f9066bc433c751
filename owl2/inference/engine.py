"""Load once, answer many: chat, stream, batch, score.

::

    messages ──processor──► input_ids (B, S), padded on the left, pixel_values (N, 3, H, W)
    ──model.generate──► new ids (B, T) ──► text

B conversations of S tokens, N pictures in all, T new tokens. Nothing is kept between calls, so a
second call gives the same as the first.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import BatchFeature, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from owl2.errors import InputError
from owl2.inference.decoding import Decoding, Options
from owl2.inference.loading import load_model
from owl2.inference.scoring import prompt_and_answer, score_answers
from owl2.inference.streaming import stream_tokens, text_pieces
from owl2.model.owl2 import Owl2ForConditionalGeneration
from owl2.processing.chat import Message, check_question
from owl2.processing.image import ImagePolicy
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer

Messages = Sequence[Message]


class Engine:
    """A model and its processor, answering.

    Args:
        model: on the device and in the dtype it is to run in.
        processor: the same checkpoint's.

    Raises:
        InputError: if the two do not fit.
    """

    def __init__(self, model: Owl2ForConditionalGeneration, processor: Owl2Processor) -> None:
        for what, ours, theirs in (
            ("image token id", model.config.image_token_id, processor.image_token_id),
            ("tokens a picture", model.config.num_image_tokens, processor.num_image_tokens),
            ("picture size", model.config.image_size, processor.image_processor.size),
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
        self._end_ids = _end_ids(model.generation_config, processor)
        self._open_ids = _byte_ids(processor)

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
    ) -> "Engine":
        """A checkpoint's engine.

        Args:
            name_or_path: a directory or a hub id.
            device: default: cuda, else mps, else cpu.
            dtype: default: what suits the device (`loading.choose_dtype`).
            attn_implementation: eager, sdpa or flash_attention_2.
            image_policy: resize or pad, instead of the checkpoint's.
            max_pixels: the largest picture to accept, instead of the checkpoint's.
            quantize: 8bit or 4bit: the decoder's weights in fewer bits.

        Raises:
            InputError: what cannot be loaded, and why.
        """
        model = load_model(name_or_path, device, dtype, attn_implementation, quantize)
        processor = Owl2Processor.from_pretrained(
            name_or_path, image_policy=image_policy, max_pixels=max_pixels
        )
        return cls(model, processor)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer can have together; a picture takes K + 1 of them."""
        return int(self.model.config.max_position_embeddings)

    # -------------------------------------------------------------- answers

    def chat(self, messages: Messages, **options: Unpack[Options]) -> str:
        """The answer to a conversation that ends with a question.

        Greedy, unless the checkpoint's `generation_config` or an option says otherwise.

        Raises:
            InputError: an empty question, a picture that cannot be read or is missing, a prompt
                beyond the context, an option out of its range, logits that are not finite.
        """
        return self.batch([messages], **options)[0]

    def batch(self, list_of_messages: Sequence[Messages], **options: Unpack[Options]) -> list[str]:
        """`chat` for several conversations at once, with any number of pictures each."""
        if not list_of_messages:
            return []
        decoding = Decoding.of(options, self.model.generation_config)
        inputs, room = self._inputs(list_of_messages)
        limits = [min(decoding.max_new_tokens, tokens) for tokens in room]
        answers = self._generate(inputs, decoding, max(limits)).tolist()
        # Shorter prompts may go on for longer; what a long one got beyond its limit is not its own.
        return [self._decode(answer[:limit]) for answer, limit in zip(answers, limits, strict=True)]

    def stream(self, messages: Messages, **options: Unpack[Options]) -> Iterator[str]:
        """The answer of `chat` in pieces, as it is made; joined, they are exactly that answer.

        The input is checked at once, the model runs when the first piece is asked for. Leaving the
        loop early (or `.close()`) ends the generation.
        """
        decoding = Decoding.of(options, self.model.generation_config)
        inputs, [room] = self._inputs([messages])

        def generate(streamer: BaseStreamer, stop: StoppingCriteria) -> None:
            limit = min(decoding.max_new_tokens, room)
            self._generate(inputs, decoding, limit, streamer, StoppingCriteriaList([stop]))

        return self._stream(generate)

    def _stream(self, generate: Any) -> Iterator[str]:
        tokens = stream_tokens(generate)
        try:
            yield from text_pieces(tokens, self._decode, self._open_ids)
        finally:
            tokens.close()  # type: ignore[attr-defined]  # it is a generator

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
        its pictures is computed once for all choices, and a score does not depend on the others.

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
        inputs, _ = self._inputs([messages])
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
        pixels = inputs.get("pixel_values")
        for ids, members in groups.items():
            answers = [answer for _, answer in members]
            rows = score_answers(self.model, ids, answers, pixels, max(1, batch_size))
            for (number, _), row in zip(members, rows, strict=True):
                scores[number] = float((row.mean() if normalise else row.sum()).item())
        return scores

    # -------------------------------------------------------------- parts

    def _inputs(self, list_of_messages: Sequence[Messages]) -> tuple[BatchFeature, list[int]]:
        """The model's inputs, and how many tokens of the context each prompt leaves."""
        for number, messages in enumerate(list_of_messages):
            try:
                check_question(messages)
            except InputError as error:
                if len(list_of_messages) == 1:
                    raise
                raise InputError(f"Conversation {number}: {error}") from error
        inputs = self.processor.apply_chat_template(
            list(list_of_messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        lengths = inputs["attention_mask"].sum(1).tolist()
        room = [self.context - length for length in lengths]
        if min(room) < 1:
            number = room.index(min(room))
            which = f"The prompt of conversation {number}" if len(room) > 1 else "The prompt"
            raise InputError(
                f"{which} has {lengths[number]} tokens; the model's context is {self.context}, one "
                f"of them for the answer: {1 - room[number]} too many. Use fewer words, turns or "
                f"pictures (a picture takes {self.processor.num_image_tokens})."
            )
        return inputs.to(self.model.device, dtype=self.model.dtype), room

    def _generate(
        self,
        inputs: BatchFeature,
        decoding: Decoding,
        limit: int,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> torch.Tensor:
        """New ids (B, T), T at most `limit`."""
        prompt = inputs["input_ids"].shape[1]
        # transformers fills what is unset from the checkpoint's settings, and warns when it then
        # has both: name the limit as a checkpoint with a max_length (LLaMA's have one) does.
        named = self.model.generation_config.max_new_tokens is not None
        length = {"max_new_tokens": limit} if named else {"max_length": prompt + limit}
        config = GenerationConfig(
            **length,
            do_sample=False,  # what is sampled, our own processor samples
            num_beams=1,  # beams have no order to stream in
            num_return_sequences=1,
            return_dict_in_generate=False,
            eos_token_id=self._end_ids or None,
            pad_token_id=self._end_ids[0] if self._end_ids else 0,  # after the end; not read
            # Settings of a sampling checkpoint, or transformers would warn of them.
            temperature=1.0,
            top_p=1.0,
            top_k=50,
        )
        ids = self.model.generate(
            **inputs,
            generation_config=config,
            logits_processor=decoding.processors(self.model.dtype),
            stopping_criteria=stopping,
            streamer=streamer,
            synced_gpus=self.synced_gpus,
        )
        return ids[:, prompt:]

    def _decode(self, ids: list[int]) -> str:
        """New ids up to the end token → text, without white space around it."""
        end = next((place for place, id_ in enumerate(ids) if id_ in self._end_ids), len(ids))
        # No tidying of spaces: it changes text that was streamed already.
        text = self.processor.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()


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
