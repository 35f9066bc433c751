"""The figures: for each, what runs, in which unit it is told, and the least time it could take.

A figure has up to three implementations with fixed names, `textbook`, `owl2` and `llama`; others
are named for what they are, and owl2 is compared with each of them as `against_NAME`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from owl2.bench.flops import decode_bytes, decoder_flops, image_flops, training_flops
from owl2.bench.implementations import LlamaSteps, Prompts, Steps, Subjects
from owl2.bench.memory import STEPS, step_memory
from owl2.bench.workload import BATCH, NEW, QUESTION, TEXT, TOGETHER, Request


@dataclass(frozen=True)
class Run:
    """Something to measure: calling it takes the time, or returns the bytes.

    Attributes:
        work: tokens that it makes; 1 where the figure is a time or memory.
    """

    call: Callable[[], Any]
    work: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A comparison.

    Attributes:
        unit: ms, s, tokens/s or MiB.
        runs: by name, in the order in which they take turns.
        least: seconds that owl2's run takes at the machine's limits; None if there is no such.
        ratio: the cost of the first over that of the second.
        most: rounds at most, where more say nothing new.
        warm: what runs once before; None: all. Those that only use what is warm already need not.
    """

    unit: str
    runs: Mapping[str, Run]
    least: float | None
    ratio: tuple[str, str] = ("textbook", "owl2")
    most: int | None = None
    warm: Collection[str] | None = None


def encode_8(on: Subjects) -> Figure:
    """Eight images through vision encoder and abstractor, in one batch."""
    pixels = on.workload.pixels(BATCH)
    runs = {
        "textbook": Run(lambda: no_grad(on.textbook.encode)(pixels)),
        "owl2": Run(lambda: on.encode(pixels)),
    }
    return Figure("ms", runs, on.limits.seconds(BATCH * image_flops(on.config)))


def prefill_1(on: Subjects) -> Figure:
    """An image and 64 text tokens, to the first token."""
    return _prefill(on, 1)


def prefill_8(on: Subjects) -> Figure:
    """Eight of them; the textbook takes one after the other."""
    return _prefill(on, BATCH)


def _prefill(on: Subjects, count: int) -> Figure:
    ids = torch.cat([on.workload.prompt() for _ in range(count)])
    pixels = on.workload.pixels(count)
    words = on.workload.words(ids.numel()).view_as(ids)

    def textbook() -> None:
        for row in range(count):
            on.textbook.prefill(ids[row : row + 1], pixels[row : row + 1])

    runs = {
        "textbook": Run(textbook),
        "owl2": Run(lambda: on.prefill(ids, pixels)),
        "llama": Run(lambda: _llama_prefill(on, words)),
    }
    one = image_flops(on.config) + decoder_flops(on.config, ids.shape[1])
    return Figure("ms", runs, on.limits.seconds(count * one))


@torch.no_grad()
def _llama_prefill(on: Subjects, ids: torch.Tensor) -> None:
    on.llama(ids, use_cache=True, logits_to_keep=1)


def ttft_second_question(on: Subjects) -> Figure:
    """Time to the first token of another question about an image that was asked about before.

    Each round asks about a new image: the first question pays for it, the second does not.
    """
    before = on.workload.words(TEXT - QUESTION)
    images = {"now": on.workload.pixels()}

    def request() -> Request:
        ids = torch.cat([before, on.workload.places(), on.workload.words(QUESTION)], dim=1)
        return Request(ids, images["now"], 1)  # more would go on behind its back

    def first() -> None:
        on.first_token(on.runner, request())

    def renew_and_ask() -> None:
        images["now"] = images["now"].flip(-1) + 1e-2
        first()

    runs = {
        "first": Run(renew_and_ask),
        "owl2": Run(first),
        "textbook": Run(lambda: on.textbook.prefill(*request()[:2])),
    }
    prefix = TEXT - QUESTION + on.config.num_image_tokens
    flops = decoder_flops(on.config, QUESTION, before=prefix)
    return Figure("ms", runs, on.limits.seconds(flops, _step_bytes(on)))


def decode_1(on: Subjects) -> Figure:
    """One sequence after an image and 64 text tokens, greedy."""
    return _decode(on, 1)


def decode_1_int8(on: Subjects) -> Figure:
    """The same with the decoder's weights in 8 bits; the textbook keeps the model's dtype."""
    prompt = on.workload.prompt(), on.workload.pixels()
    ours = Steps(on.eight_bits, prompt)
    runs = {
        "textbook": _textbook_decode(on, prompt),
        "owl2": Run(partial(ours.decode, NEW), NEW),
    }
    return Figure("tokens/s", runs, NEW * on.limits.seconds(read=decode_bytes(on.config, 1)))


def decode_16(on: Subjects) -> Figure:
    """Sixteen together; the textbook, one after the other, makes as many a second as of one."""
    return _decode(on, TOGETHER)


def _decode(on: Subjects, rows: int) -> Figure:
    prompt = on.workload.prompt(), on.workload.pixels()
    words = on.workload.words(prompt[0].shape[1])
    ours, llama = Steps(on.model, prompt, rows), LlamaSteps(on.llama, words, rows)
    runs = {
        "textbook": _textbook_decode(on, prompt),
        "owl2": Run(partial(ours.decode, NEW), rows * NEW),
        "llama": Run(partial(llama.decode, NEW), rows * NEW),
    }
    if rows > 1:
        alone = Steps(on.model, prompt)
        runs["one"] = Run(partial(alone.decode, NEW), NEW)
    flops = rows * decoder_flops(on.config, 1, before=prompt[0].shape[1])
    return Figure("tokens/s", runs, NEW * on.limits.seconds(flops, _step_bytes(on)))


def _textbook_decode(on: Subjects, prompt: tuple[torch.Tensor, torch.Tensor]) -> Run:
    token, cache = on.textbook.prefill(*prompt)
    return Run(lambda: on.textbook.decode(token, cache, NEW), NEW)


def _step_bytes(on: Subjects) -> float:
    return decode_bytes(on.config, on.model.dtype.itemsize)


def generate_16_mixed(on: Subjects) -> Figure:
    """Sixteen requests of all lengths, some about an image, with answers of 16 to 91 tokens."""
    requests = on.workload.requests()
    limits = [request.limit for request in requests]
    tokens = sum(limits)

    def one_by_one() -> None:
        for request in requests:
            on.answer(on.forgetful, [request])

    runs = {
        "textbook": Run(lambda: on.textbook.generate([r[:2] for r in requests], limits), tokens),
        "owl2": Run(lambda: on.answer(on.forgetful, requests), tokens),
        "one_by_one": Run(one_by_one, tokens),
    }
    flops = sum(
        decoder_flops(on.config, request.ids.shape[1])
        + (image_flops(on.config) if request.pixel_values is not None else 0)
        for request in requests
    )
    # Then as many steps as the longest answer has tokens.
    steps = (max(limits) - 1) * on.limits.seconds(read=_step_bytes(on))
    return Figure("tokens/s", runs, on.limits.seconds(flops) + steps, most=2, warm={"owl2"})


def train_step(on: Subjects) -> Figure:
    """Eight samples of mixed lengths, padded to the longest: forward, backward, update."""
    return _train(on, on.training.padded_step)


def train_step_packed(on: Subjects) -> Figure:
    """The same samples packed into rows; the textbook pads."""
    return _train(on, on.training.packed_step)


def _train(on: Subjects, step: Callable[[], Any]) -> Figure:
    runs = {"textbook": Run(on.training.textbook_step), "owl2": Run(step)}
    batches = on.training.batches
    flops = training_flops(on.config, batches.lengths, batches.labels, batches.images)
    return Figure("ms", runs, on.limits.seconds(flops), most=3)


def train_memory(on: Subjects) -> Figure:
    """The most memory of two such steps, padded, each implementation in a process of its own.

    owl2's is with `gradient_checkpointing: selective`, as in all steps of the bench; `all_kept` and
    `least_kept` are with `false` and `true`.
    """
    runs = {who: Run(partial(step_memory, who, on.origin)) for who in STEPS}
    return Figure("MiB", runs, None, ratio=("owl2", "textbook"), most=1)


def mam_decode(on: Subjects) -> Figure:
    """A decode step with MAM and, by the same code, without it; `llama` is transformers' own."""
    prompt = on.workload.words(TEXT + on.config.num_image_tokens), None
    ours, plain = Steps(on.model, prompt), Steps(on.plain, prompt)
    llama = LlamaSteps(on.llama, prompt[0])
    runs = {
        "owl2": Run(partial(ours.decode, NEW), NEW),
        "plain": Run(partial(plain.decode, NEW), NEW),
        "llama": Run(partial(llama.decode, NEW), NEW),
    }
    return Figure(
        "tokens/s", runs, NEW * on.limits.seconds(read=_step_bytes(on)), ratio=("owl2", "plain")
    )


def mam_prefill(on: Subjects) -> Figure:
    """An image that is encoded already and 64 words through the decoder, with and without MAM."""
    ids = on.workload.prompt()
    prompt = on.runner.prepare(ids[0].tolist(), on.workload.pixels())
    words = on.workload.words(ids.shape[1])
    ours, plain = (Prompts(model, feature_bytes=1 << 30) for model in (on.model, on.plain))
    runs = {
        "owl2": Run(lambda: ours.read([prompt])),
        "plain": Run(lambda: plain.read([prompt])),
        "llama": Run(lambda: _llama_prefill(on, words)),
    }
    least = on.limits.seconds(decoder_flops(on.config, ids.shape[1]))
    return Figure("ms", runs, least, ratio=("owl2", "plain"))


def no_grad(function: Callable) -> Callable:
    """The same without a graph."""
    return torch.no_grad()(function)


FIGURES: dict[str, Callable[[Subjects], Figure]] = {
    make.__name__: make
    for make in (
        encode_8,
        prefill_1,
        prefill_8,
        ttft_second_question,
        decode_1,
        decode_1_int8,
        decode_16,
        generate_16_mixed,
        mam_decode,
        mam_prefill,
        train_memory,  # while this process holds no training of its own
        train_step,
        train_step_packed,
    )
}
