"""Log-probabilities of given answers, and logits of the next token.

::

    prompt with its images ──prefill──► cache, logits of each answer's first token
    answers ──model over the cache, in batches──► logits of their other tokens

Shapes: C answers of up to T tokens, B prompts, W tokens of interest, V vocabulary.
"""

import copy
from collections.abc import Collection, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from owl2.engine.running_batch import PrefillOutput
from owl2.engine.sampler import Logprobs, compute_logprobs, non_finite_error
from owl2.engine.sampling_params import SamplingParams
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.labeling import encode_labeled
from owl2.processing.loss_mask import EncodedConversation
from owl2.processing.messages import Message, parse_messages
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.processing.processor import Owl2Processor

if TYPE_CHECKING:
    from owl2.engine.engine import Engine

_SCORED_TOGETHER = 256  # tokens of a prompt; their logits take V * 4 bytes each


def encode_answer(
    processor: Owl2Processor, messages: Sequence[Message], answer: str
) -> tuple[EncodedConversation, int, int]:
    """Encode a conversation and its answer with the rendering and loss mask of training.

    No image is opened, because there may be many answers about one.

    Returns:
        The encoded conversation, and the start and end of the answer in its ids. The answer
        includes its end token. Answers of earlier turns belong to the prompt.

    Raises:
        InputError: Invalid messages, or an answer without tokens.
    """
    if not answer.strip():
        raise InputError(f"The answer {answer!r} is empty.", ErrorCode.EMPTY_MESSAGE)
    turns = [*messages, {"role": "assistant", "content": answer}]
    conversation = parse_messages(turns, merge_roles=True)
    sample, _ = encode_labeled(processor, conversation)
    end = len(sample.ids)
    while end and not sample.loss_mask[end - 1]:  # a template may write a line break after the end
        end -= 1
    begin = end
    while begin and sample.loss_mask[begin - 1]:
        begin -= 1
    if begin == end:
        raise InputError(f"The answer {answer!r} has no tokens.", ErrorCode.EMPTY_MESSAGE)
    return sample, begin, end


def group_choices(
    processor: Owl2Processor,
    messages: Sequence[Message],
    choices: Sequence[str],
    context_length: int,
    removed_end_ids: Collection[int] = (),
) -> dict[tuple[int, ...], dict[int, list[int]]]:
    """Choices by the ids of their prompts: the ids of each choice by its position in the list.

    There is one prompt, unless a choice changes how it is tokenized.

    Args:
        removed_end_ids: End tokens that are not to be scored.

    Raises:
        InputError: A choice is empty, or exceeds the context.
    """
    groups: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for index, choice in enumerate(choices):
        sample, begin, end = encode_answer(processor, messages, choice)
        if (excess := end - context_length) > 0:
            raise InputError(
                f"With choice {index + 1} the prompt has {end} tokens, {excess} more than the "
                f"context of {context_length}.",
                ErrorCode.TOO_LONG,
            )
        if end - begin > 1 and sample.ids[end - 1] in removed_end_ids:
            end -= 1
        groups.setdefault(tuple(sample.ids[:begin]), {})[index] = sample.ids[begin:end]
    return groups


def score_choices(
    engine: "Engine",
    messages: Sequence[Message],
    choices: Sequence[str],
    include_end: bool,
    batch_size: int,
    adapter: str | None,
) -> list[torch.Tensor]:
    """The log-probabilities of the tokens of each choice, see `Engine.score`."""
    if isinstance(choices, str) or not choices:
        raise InputError("choices must be a non-empty list of strings.", ErrorCode.INVALID_VALUE)
    prompt, processor = engine.encode(messages, adapter=adapter), engine.processor_of(adapter)
    removed = () if include_end else engine.end_ids
    scores: dict[int, torch.Tensor] = {}
    groups = group_choices(processor, messages, choices, engine.context_length, removed)
    for ids, answers in groups.items():
        own_prompt = prompt.with_ids(ids, processor.image_token_id)
        run = partial(score_answers, engine.model, list(answers.values()), max(1, batch_size))
        scores |= zip(answers, engine.run_prefilled(own_prompt, run), strict=True)
    return [scores[index] for index in range(len(choices))]


@torch.no_grad()
def score_answers(
    model: Owl2ForConditionalGeneration,
    answers: Sequence[Sequence[int]],
    batch_size: int,
    prompt: PrefillOutput,
) -> Generator[None, None, list[torch.Tensor]]:
    """The log-probability of every token of C answers to one prompt; yields between batches.

    Args:
        answers: C lists of ids.
        prompt: The prefill of the prompt; not modified.

    Returns:
        C tensors of the answers' lengths, on the CPU.

    Raises:
        InputError: Logits that are not finite.
    """
    scores: list[torch.Tensor] = []
    for start in range(0, len(answers), batch_size):
        if start:
            yield
        batch = answers[start : start + batch_size]
        width = max(len(answer) for answer in batch)
        # Padding is on the right, where causal attention hides it from the answers.
        rows = [list(answer) + [0] * (width - len(answer)) for answer in batch]
        ids = torch.tensor(rows, device=prompt.logits.device)  # (C, T)
        logits = prompt.logits[:, None].expand(len(batch), -1, -1)  # (C, 1, V)
        if width > 1:
            cache = copy.deepcopy(prompt.cache)  # the model writes to it
            cache.batch_repeat_interleave(len(batch))
            options = prompt.options(model, len(batch))
            rest = model(input_ids=ids[:, :-1], past_key_values=cache, **options).logits
            logits = torch.cat([logits, rest], dim=1)  # (C, T, V)
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (C, T)
        scores += [row[: len(answer)].cpu() for row, answer in zip(logprobs, batch, strict=True)]
    for row in scores:
        if not row.isfinite().all():
            step = int((~row.isfinite()).nonzero()[0, 0]) + 1
            raise non_finite_error(model.dtype, f"token {step} of a choice")
    return scores


@torch.no_grad()
def score_prompt(
    model: Owl2ForConditionalGeneration,
    ids: Sequence[int],
    top_logprobs: int,
    first: PrefillOutput,
) -> Generator[None, None, list[Logprobs]]:
    """The log-probabilities of the S - 1 tokens of a text prompt that follow its first one.

    It yields between parts of the prompt.

    Args:
        ids: S token ids, without images.
        top_logprobs: Number of most probable tokens in addition to each token.
        first: The prefill of the first token; not modified.
    """
    params = SamplingParams(top_logprobs=top_logprobs)
    cache = copy.deepcopy(first.cache)  # the model writes to it
    logits = first.logits  # (1, V)
    alpha = model.config.ntk_alpha(len(ids))
    options = first._replace(ntk_alpha=alpha).options(model)
    scores: list[Logprobs] = []
    for start in range(1, len(ids), _SCORED_TOGETHER):
        if start > 1:
            yield
        chunk = ids[start : start + _SCORED_TOGETHER]
        rest = torch.tensor([chunk], device=logits.device)
        output = model(input_ids=rest, past_key_values=cache, **options).logits[0]
        logits = torch.cat([logits[-1:], output[:-1]])  # (T, V), each before its token
        found = compute_logprobs(logits, chunk, [params] * len(chunk))
        scores += [row for row in found if row is not None]
        logits = output
    return scores


def next_token_logits(
    engine: "Engine", prompts: Sequence[PreparedPrompt], token_ids: Sequence[int]
) -> torch.Tensor:
    """The logits (B, W), see `Engine.next_token_logits`."""
    prompts = [engine.encode(prompt) for prompt in prompts]  # checks them
    if engine.core is not None:
        rows = engine.core.next_token_logits(prompts)
    else:
        rows = [engine.run_prefilled(prompt, lambda output: output.logits[0]) for prompt in prompts]
    logits = torch.stack(rows)[:, list(token_ids)].float().cpu()
    if not logits.isfinite().all():
        raise non_finite_error(engine.model.dtype, "the next token")
    return logits
