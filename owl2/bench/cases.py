"""The benchmark cases: what runs, in which unit, and the minimum time on this machine.

A case has up to three implementations with standard names: `baseline`, `owl2` and `llama`. owl2 is
compared with further ones as `vs_NAME`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from owl2.bench.flops import decode_bytes, decoder_flops, image_flops, training_flops
from owl2.bench.implementations import (
    DecodeRunner,
    Implementations,
    LlamaDecodeRunner,
    PrefillRunner,
    first_token,
    generate,
)
from owl2.bench.measure import BenchCase, Run
from owl2.bench.memory import STEPS, step_memory
from owl2.bench.workload import (
    BATCH_SIZE,
    CONCURRENT,
    NEW_TOKENS,
    QUESTION_TOKENS,
    TEXT_TOKENS,
    BenchRequest,
)


def encode_8(on: Implementations) -> BenchCase:
    """Eight images through the vision encoder and the abstractor in one batch."""
    pixels = on.workload.pixels(BATCH_SIZE)
    runs = {
        "baseline": Run(lambda: torch.no_grad()(on.baseline.encode)(pixels)),
        "owl2": Run(lambda: on.encode(pixels)),
    }
    return BenchCase("ms", runs, on.roofline.seconds(BATCH_SIZE * image_flops(on.config)))


def _prefill(on: Implementations, count: int) -> BenchCase:
    ids = torch.cat([on.workload.prompt() for _ in range(count)])
    pixels = on.workload.pixels(count)
    text = on.workload.text_ids(ids.numel()).view_as(ids)

    def baseline() -> None:
        for row in range(count):
            on.baseline.prefill(ids[row : row + 1], pixels[row : row + 1])

    runs = {
        "baseline": Run(baseline),
        "owl2": Run(lambda: on.prefill(ids, pixels)),
        "llama": Run(lambda: _llama_prefill(on, text)),
    }
    flops = image_flops(on.config) + decoder_flops(on.config, ids.shape[1])
    return BenchCase("ms", runs, on.roofline.seconds(count * flops))


@torch.no_grad()
def _llama_prefill(on: Implementations, ids: torch.Tensor) -> None:
    on.llama(ids, use_cache=True, logits_to_keep=1)


def prefill_1(on: Implementations) -> BenchCase:
    """One prompt with an image and 64 text tokens, to the first token."""
    return _prefill(on, 1)


def prefill_8(on: Implementations) -> BenchCase:
    """Eight prompts in a batch; the baseline processes them one by one."""
    return _prefill(on, BATCH_SIZE)


def ttft_second_question(on: Implementations) -> BenchCase:
    """Time to the first token of a second question about an image.

    Each round has a new image. `first` is the first question about it.
    """
    prefix = on.workload.text_ids(TEXT_TOKENS - QUESTION_TOKENS)
    pixels = on.workload.pixels()

    def request() -> BenchRequest:
        question = on.workload.text_ids(QUESTION_TOKENS)
        ids = torch.cat([prefix, on.workload.image_ids(), question], dim=1)
        return BenchRequest(ids, pixels, 1)

    def first() -> None:
        nonlocal pixels
        pixels = pixels.flip(-1) + 1e-2
        first_token(on.engine, request())

    runs = {
        "first": Run(first),
        "owl2": Run(lambda: first_token(on.engine, request())),
        "baseline": Run(lambda: on.baseline.prefill(*request()[:2])),
    }
    cached = TEXT_TOKENS - QUESTION_TOKENS + on.config.num_image_tokens
    flops = decoder_flops(on.config, QUESTION_TOKENS, cached=cached)
    return BenchCase("ms", runs, on.roofline.seconds(flops, _step_bytes(on)))


def _step_bytes(on: Implementations) -> float:
    return decode_bytes(on.config, on.model.dtype.itemsize)


def _decode(on: Implementations, rows: int) -> BenchCase:
    prompt = on.workload.prompt(), on.workload.pixels()
    text = on.workload.text_ids(prompt[0].shape[1])
    owl2, llama = DecodeRunner(on.model, prompt, rows), LlamaDecodeRunner(on.llama, text, rows)
    runs = {
        "baseline": _baseline_decode(on, prompt),
        "owl2": Run(partial(owl2.decode, NEW_TOKENS), rows * NEW_TOKENS),
        "llama": Run(partial(llama.decode, NEW_TOKENS), rows * NEW_TOKENS),
    }
    if rows > 1:
        single = DecodeRunner(on.model, prompt)
        runs["single"] = Run(partial(single.decode, NEW_TOKENS), NEW_TOKENS)
    flops = rows * decoder_flops(on.config, 1, cached=prompt[0].shape[1])
    return BenchCase("tokens/s", runs, NEW_TOKENS * on.roofline.seconds(flops, _step_bytes(on)))


def _baseline_decode(on: Implementations, prompt: tuple[torch.Tensor, torch.Tensor]) -> Run:
    token, cache = on.baseline.prefill(*prompt)
    return Run(lambda: on.baseline.decode(token, cache, NEW_TOKENS), NEW_TOKENS)


def decode_1(on: Implementations) -> BenchCase:
    """Greedy decoding of one sequence after an image and 64 text tokens."""
    return _decode(on, 1)


def decode_1_int8(on: Implementations) -> BenchCase:
    """The same with 8-bit weights in the decoder; the baseline keeps the model's dtype."""
    prompt = on.workload.prompt(), on.workload.pixels()
    owl2 = DecodeRunner(on.int8, prompt)
    runs = {
        "baseline": _baseline_decode(on, prompt),
        "owl2": Run(partial(owl2.decode, NEW_TOKENS), NEW_TOKENS),
    }
    seconds = on.roofline.seconds(read=decode_bytes(on.config, 1))
    return BenchCase("tokens/s", runs, NEW_TOKENS * seconds)


def decode_16(on: Implementations) -> BenchCase:
    """Sixteen sequences in a batch; the throughput of the baseline is that of one sequence."""
    return _decode(on, CONCURRENT)


def generate_16_mixed(on: Implementations) -> BenchCase:
    """Sixteen requests of different lengths, some with an image, with 16 to 91 new tokens."""
    requests = on.workload.requests()
    limits = [request.limit for request in requests]
    tokens = sum(limits)

    def sequential() -> None:
        for request in requests:
            generate(on.engine_without_caches, [request])

    runs = {
        "baseline": Run(lambda: on.baseline.generate([r[:2] for r in requests], limits), tokens),
        "owl2": Run(lambda: generate(on.engine_without_caches, requests), tokens),
        "sequential": Run(sequential, tokens),
    }
    flops = sum(
        decoder_flops(on.config, request.ids.shape[1])
        + (image_flops(on.config) if request.pixel_values is not None else 0)
        for request in requests
    )
    # After the prefill, as many steps as the longest answer has tokens.
    steps = (max(limits) - 1) * on.roofline.seconds(read=_step_bytes(on))
    seconds = on.roofline.seconds(flops) + steps
    return BenchCase("tokens/s", runs, seconds, max_rounds=2, warm_up={"owl2"})


def mam_decode(on: Implementations) -> BenchCase:
    """Decoding with MAM and, by the same code, without it."""
    prompt = on.workload.text_ids(TEXT_TOKENS + on.config.num_image_tokens), None
    runners: dict[str, DecodeRunner | LlamaDecodeRunner] = {
        "owl2": DecodeRunner(on.model, prompt),
        "no_mam": DecodeRunner(on.no_mam, prompt),
        "llama": LlamaDecodeRunner(on.llama, prompt[0]),
    }
    runs = {name: Run(partial(r.decode, NEW_TOKENS), NEW_TOKENS) for name, r in runners.items()}
    seconds = NEW_TOKENS * on.roofline.seconds(read=_step_bytes(on))
    return BenchCase("tokens/s", runs, seconds, ratio=("owl2", "no_mam"))


def mam_prefill(on: Implementations) -> BenchCase:
    """An encoded image and 64 text tokens through the decoder, with and without MAM."""
    ids = on.workload.prompt()
    prompt = on.engine.prepare(ids[0].tolist(), on.workload.pixels())
    text = on.workload.text_ids(ids.shape[1])
    owl2, no_mam = (PrefillRunner(model, feature_bytes=1 << 30) for model in (on.model, on.no_mam))
    runs = {
        "owl2": Run(lambda: owl2.run([prompt])),
        "no_mam": Run(lambda: no_mam.run([prompt])),
        "llama": Run(lambda: _llama_prefill(on, text)),
    }
    seconds = on.roofline.seconds(decoder_flops(on.config, ids.shape[1]))
    return BenchCase("ms", runs, seconds, ratio=("owl2", "no_mam"))


def train_memory(on: Implementations) -> BenchCase:
    """Peak memory of two training steps, each implementation in its own process.

    owl2 uses `gradient_checkpointing: selective`, as in all cases; `no_checkpointing` and
    `full_checkpointing` use `false` and `true`.
    """
    runs = {name: Run(partial(step_memory, name, on.source)) for name in STEPS}
    return BenchCase("MiB", runs, None, ratio=("owl2", "baseline"), max_rounds=1)


def _train(on: Implementations, step: Callable[[], Any]) -> BenchCase:
    runs = {"baseline": Run(on.training.baseline_step), "owl2": Run(step)}
    batches = on.training.batches
    flops = training_flops(on.config, batches.lengths, batches.labels, batches.images)
    return BenchCase("ms", runs, on.roofline.seconds(flops), max_rounds=3)


def train_step(on: Implementations) -> BenchCase:
    """A training step on eight samples of different lengths, padded to the longest."""
    return _train(on, on.training.padded_step)


def train_step_packed(on: Implementations) -> BenchCase:
    """The same samples packed into rows; the baseline pads."""
    return _train(on, on.training.packed_step)


CASES: dict[str, Callable[[Implementations], BenchCase]] = {
    create.__name__: create
    for create in (
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
        train_memory,  # before this process creates a model to train
        train_step,
        train_step_packed,
    )
}
