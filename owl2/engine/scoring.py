"""Log-probabilities of given answers.

::

    prompt with its images ──model, once──► cache, logits of each answer's first token
    answers ──model over the cache, in batches──► logits of their other tokens

Shapes: C choices of T tokens at most, P the prompt's tokens, V the vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from owl2.engine.sampling import non_finite_error
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.chat_template import Message, parse_messages, render_with_answers
from owl2.processing.loss_mask import encode_with_loss_mask
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import start_ids


def prompt_and_answer(
    processor: Owl2Processor, messages: Sequence[Message], answer: str
) -> tuple[list[int], list[int]]:
    """Ids before the answer, and those of the answer that training labels (its end token too).

    The same rendering and mask as `Owl2Processor.for_training`, but no image is opened, as
    there may be many answers about one. Answers of earlier turns belong to the prompt.
    """
    conversation = parse_messages([*messages, {"role": "assistant", "content": answer}])
    tokenizer = processor.tokenizer
    template = str(processor.chat_template)
    text, spans = render_with_answers(conversation, template, tokenizer.special_tokens_map)
    image_ids = [processor.image_token_id] * processor.num_image_tokens
    sample = encode_with_loss_mask(tokenizer, text, spans, start_ids(tokenizer), image_ids)
    end = len(sample.ids)
    while end and not sample.loss_mask[end - 1]:  # a template may write a line break after the end
        end -= 1
    begin = end
    while begin and sample.loss_mask[begin - 1]:
        begin -= 1
    if begin == end:
        raise InputError(f"The choice {answer!r} has no tokens to score.")
    return sample.ids[:begin], sample.ids[begin:end]


@torch.no_grad()
def read_alone(
    model: Owl2ForConditionalGeneration, prompt: Sequence[int], pixel_values: torch.Tensor | None
) -> tuple[torch.Tensor, DynamicCache]:
    """The logits (1, V) after a prompt of P ids with its N images (N, 3, H, W), and its cache."""
    cache = DynamicCache(config=model.config)
    images: dict[str, Any] = {}
    if pixel_values is not None:
        images["pixel_values"] = pixel_values.to(model.device, model.dtype)
    ids = torch.tensor([list(prompt)], device=model.device)  # (1, P)
    outputs = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **images
    )
    return outputs.logits[:, -1], cache


@torch.no_grad()
def score_answers(
    model: Owl2ForConditionalGeneration,
    logits: torch.Tensor,
    cache: DynamicCache,
    answers: Sequence[Sequence[int]],
    batch_size: int,
) -> list[torch.Tensor]:
    """Log-probability of every token of every answer after one prompt: C tensors of its length.

    Args:
        logits: (1, V) after the prompt.
        cache: of the prompt; left as it is.
        answers: C lists of ids.
    """
    scores = []
    for start in range(0, len(answers), batch_size):
        some = answers[start : start + batch_size]
        scores += _score_after(model, cache, logits[:, None], some)
    return scores


def _score_after(
    model: Owl2ForConditionalGeneration,
    cache: DynamicCache,
    first: torch.Tensor,
    answers: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    lengths = [len(answer) for answer in answers]
    longest = max(lengths)
    # Padded on the right, where causal attention keeps it from all that comes before.
    rows = [list(answer) + [0] * (longest - len(answer)) for answer in answers]
    ids = torch.tensor(rows, device=first.device)  # (C, T)
    logits = first.expand(len(answers), -1, -1)  # (C, 1, V)
    if longest > 1:
        own = copy.deepcopy(cache)  # the model writes into it, and other batches need it as it is
        own.batch_repeat_interleave(len(answers))
        after = model(input_ids=ids[:, :-1], past_key_values=own, use_cache=True).logits
        logits = torch.cat([logits, after], dim=1)  # (C, T, V)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (C, T)
    scores = [row[:length].cpu() for row, length in zip(log_probabilities, lengths, strict=True)]
    for row in scores:
        if not row.isfinite().all():
            step = int((~row.isfinite()).nonzero()[0, 0]) + 1
            raise non_finite_error(model.dtype, f"token {step} of a choice")
    return scores
