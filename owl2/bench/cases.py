"""The benchmark cases: what runs, in which unit, and the minimum time on this machine.

A case has up to three implementations with standard names: `baseline`, `owl2` and `llama`. owl2 is
compared with further ones as `vs_NAME`. `CASES` lists the cases by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from owl2.bench.flops import cache_bytes, decode_bytes, decoder_flops, training_flops
from owl2.bench.implementations import (
    DecodeRunner,
    Implementations,
    PrefillRunner,
    TransformersDecodeRunner,
    generate,
)
from owl2.bench.measure import BenchCase, Run
from owl2.bench.training import MEMORY_STEPS, measure_memory
from owl2.bench.workload import (
    BATCH_SIZE,
    CONCURRENT,
    NEW_TOKENS,
    QUESTION_TOKENS,
    TEXT_TOKENS,
    BenchRequest,
)
from owl2.constants import IGNORE_INDEX
from owl2.engine.backends.cpu_products import cpu_products


def _forward(model: Any, *inputs: torch.Tensor, **options: Any) -> Run:
    return Run(lambda: torch.no_grad()(model)(*inputs, **options))


def _decoding(runner: TransformersDecodeRunner) -> Run:
    return Run(partial(runner.decode, NEW_TOKENS), NEW_TOKENS * runner.rows)


def _step_bytes(impls: Implementations) -> float:
    return decode_bytes(impls.model, impls.model.dtype.itemsize)


def _step_seconds(
    impls: Implementations, lengths: Sequence[int], itemsize: float | None = None
) -> float:
    """The minimum time of a decode step for sequences with these numbers of cached tokens.

    Args:
        itemsize: Bytes per weight. Default: of the model's dtype.
    """
    model = impls.model
    flops = sum(decoder_flops(model, 1, cached=length) for length in lengths)
    weights = decode_bytes(model, itemsize or model.dtype.itemsize)
    return impls.roofline.seconds(flops, weights + cache_bytes(model, sum(lengths)))


def _decoding_seconds(
    impls: Implementations, request: BenchRequest, rows: int = 1, itemsize: float | None = None
) -> float:
    """The minimum time of `_decoding`, with the average length of the sequences."""
    length = request.ids.shape[1] + NEW_TOKENS // 2
    return NEW_TOKENS * _step_seconds(impls, [length] * rows, itemsize)


def owl2_encode(impls: Implementations, count: int) -> BenchCase:
    """Images through the vision encoder and the abstractor in one batch."""

    def encode_images(pixels: torch.Tensor) -> None:
        with cpu_products(pixels):  # as the engine does
            impls.model.get_image_features(pixels)

    runs = {"owl2": _forward(encode_images, impls.workload.pixels(count))}
    return BenchCase("ms", runs, impls.roofline.seconds(count * impls.image_flops))


def owl2_prefill(impls: Implementations, requests: Sequence[BenchRequest]) -> BenchCase:
    """Prompts in a batch, to their first tokens, without caches across requests."""
    runner = PrefillRunner(impls.model)

    def owl2() -> None:
        runner.run([impls.engine.prepare(r.ids[0].tolist(), r.pixel_values) for r in requests])

    images = sum(len(r.pixel_values) for r in requests if r.pixel_values is not None)
    flops = sum(decoder_flops(impls.model, request.ids.shape[1]) for request in requests)
    seconds = impls.roofline.seconds(flops + images * impls.image_flops, _step_bytes(impls))
    return BenchCase("ms", {"owl2": Run(owl2)}, seconds)


def owl2_decode(impls: Implementations, request: BenchRequest, rows: int) -> BenchCase:
    """Greedy decoding of sequences in a batch."""
    runs = {"owl2": _decoding(DecodeRunner(impls.model, request, rows))}
    return BenchCase("tokens/s", runs, _decoding_seconds(impls, request, rows))


def encode(impls: Implementations) -> BenchCase:
    """Eight images through the vision encoder and the abstractor in one batch."""
    case = owl2_encode(impls, BATCH_SIZE)
    baseline = _forward(impls.baseline.get_image_features, impls.workload.pixels(BATCH_SIZE))
    return replace(case, runs={"baseline": baseline, **case.runs})


def prefill(impls: Implementations, count: int) -> BenchCase:
    """Prompts with an image and 64 text tokens in a batch, to the first token.

    The baseline processes them one by one.
    """
    requests = [impls.workload.request() for _ in range(count)]
    ids = torch.cat([request.ids for request in requests])
    text = impls.workload.text_ids(ids.numel()).view_as(ids)
    case = owl2_prefill(impls, requests)

    @torch.no_grad()
    def baseline() -> None:
        for request in requests:
            impls.baseline(request.ids, request.pixel_values, use_cache=True)

    llama = _forward(impls.llama, text, use_cache=True, logits_to_keep=1)
    return replace(case, runs={"baseline": Run(baseline), **case.runs, "llama": llama})


def second_question(impls: Implementations) -> BenchCase:
    """Time to the first token of a second question about an image.

    Each round has a new image. `first` is the first question about it.
    """
    cached = TEXT_TOKENS - QUESTION_TOKENS + impls.model.config.num_image_tokens
    prompt = impls.workload.prompt_ids()
    pixels = impls.workload.pixels()

    def request() -> BenchRequest:
        question = impls.workload.text_ids(QUESTION_TOKENS)
        return BenchRequest(torch.cat([prompt[:, :cached], question], dim=1), pixels, 1)

    def first() -> None:
        nonlocal pixels
        pixels = pixels.flip(-1) + 1e-2
        generate(impls.engine, [request()])

    runs = {
        "first": Run(first),
        "owl2": Run(lambda: generate(impls.engine, [request()])),
        "baseline": Run(lambda: TransformersDecodeRunner(impls.baseline, request())),
    }
    flops = decoder_flops(impls.model, QUESTION_TOKENS, cached=cached)
    return BenchCase("ms", runs, impls.roofline.seconds(flops, _step_bytes(impls)))


def decode(impls: Implementations, rows: int = 1, int8: bool = False) -> BenchCase:
    """Greedy decoding of sequences in a batch after an image and 64 text tokens.

    The throughput of the baseline, and of `single` for several sequences, is that of one sequence.

    Args:
        int8: 8-bit weights in owl2's decoder, without a comparison with LLaMA.
    """
    request = impls.workload.request()
    runs = {
        "baseline": _decoding(TransformersDecodeRunner(impls.baseline, request)),
        "owl2": _decoding(DecodeRunner(impls.int8 if int8 else impls.model, request, rows)),
    }
    if not int8:
        text = BenchRequest(impls.workload.text_ids(request.ids.shape[1]))
        runs["llama"] = _decoding(TransformersDecodeRunner(impls.llama, text, rows))
    if rows > 1:
        runs["single"] = _decoding(DecodeRunner(impls.model, request))
    seconds = _decoding_seconds(impls, request, rows, itemsize=1 if int8 else None)
    return BenchCase("tokens/s", runs, seconds)


def generate_mixed(impls: Implementations) -> BenchCase:
    """Sixteen requests of different lengths, some with an image, with 16 to 91 new tokens."""
    requests = impls.workload.requests()
    tokens = sum(request.limit for request in requests)

    def baseline() -> None:
        for request in requests:
            TransformersDecodeRunner(impls.baseline, request).decode(request.limit - 1)

    def sequential() -> None:
        for request in requests:
            generate(impls.engine_without_caches, [request])

    runs = {
        "baseline": Run(baseline, tokens),
        "owl2": Run(lambda: generate(impls.engine_without_caches, requests), tokens),
        "sequential": Run(sequential, tokens),
    }
    images = sum(request.pixel_values is not None for request in requests)
    flops = sum(decoder_flops(impls.model, request.ids.shape[1]) for request in requests)
    seconds = impls.roofline.seconds(flops + images * impls.image_flops)
    # After the prefill, as many steps as the longest answer has tokens.
    for step in range(1, max(request.limit for request in requests)):
        running = [request for request in requests if request.limit > step]
        seconds += _step_seconds(impls, [request.ids.shape[1] + step - 1 for request in running])
    return BenchCase("tokens/s", runs, seconds, max_rounds=2, warm_up={"owl2"})


def mam_decode(impls: Implementations) -> BenchCase:
    """Decoding with MAM and, by the same code, without it."""
    request = BenchRequest(
        impls.workload.text_ids(TEXT_TOKENS + impls.model.config.num_image_tokens)
    )
    runs = {
        "owl2": _decoding(DecodeRunner(impls.model, request)),
        "no_mam": _decoding(DecodeRunner(impls.no_mam, request)),
        "llama": _decoding(TransformersDecodeRunner(impls.llama, request)),
    }
    seconds = _decoding_seconds(impls, request)
    return BenchCase("tokens/s", runs, seconds, ratio=("owl2", "no_mam"))


def mam_prefill(impls: Implementations) -> BenchCase:
    """An encoded image and 64 text tokens through the decoder, with and without MAM."""
    ids, pixels, _ = impls.workload.request()
    prompt = impls.engine.prepare(ids[0].tolist(), pixels)
    text = impls.workload.text_ids(ids.shape[1])
    owl2, no_mam = (
        PrefillRunner(model, feature_bytes=1 << 30) for model in (impls.model, impls.no_mam)
    )
    runs = {
        "owl2": Run(lambda: owl2.run([prompt])),
        "no_mam": Run(lambda: no_mam.run([prompt])),
        "llama": _forward(impls.llama, text, use_cache=True, logits_to_keep=1),
    }
    seconds = impls.roofline.seconds(decoder_flops(impls.model, ids.shape[1]))
    return BenchCase("ms", runs, seconds, ratio=("owl2", "no_mam"))


def train_memory(impls: Implementations) -> BenchCase:
    """Peak memory of two training steps, each implementation in its own process.

    owl2 uses `gradient_checkpointing: selective`, as in all cases; `no_checkpointing` and
    `full_checkpointing` use `false` and `true`.
    """
    runs = {name: Run(partial(measure_memory, name, impls.source)) for name in MEMORY_STEPS}
    return BenchCase("MiB", runs, ratio=("owl2", "baseline"), max_rounds=1)


def train(impls: Implementations, layout: str) -> BenchCase:
    """A training step on eight samples of different lengths, padded to the longest or packed.

    The baseline pads.
    """
    runs = {
        "baseline": Run(impls.training.baseline_step),
        "owl2": Run(partial(impls.training.step, layout)),
    }
    batch = impls.training.batches["padded"]
    lengths = batch["attention_mask"].sum(1).tolist()
    labels = int((batch["labels"] != IGNORE_INDEX).sum())
    flops = training_flops(
        impls.model, lengths, labels, len(batch["pixel_values"]) * impls.image_flops
    )
    return BenchCase("ms", runs, impls.roofline.seconds(flops), max_rounds=3)


CASES: dict[str, Callable[[Implementations], BenchCase]] = {
    "encode_8": encode,
    "prefill_1": partial(prefill, count=1),
    "prefill_8": partial(prefill, count=BATCH_SIZE),
    "ttft_second_question": second_question,
    "decode_1": decode,
    "decode_1_int8": partial(decode, int8=True),
    "decode_16": partial(decode, rows=CONCURRENT),
    "generate_16_mixed": generate_mixed,
    "mam_decode": mam_decode,
    "mam_prefill": mam_prefill,
    "train_memory": train_memory,  # before this process creates a model to train
    "train_step": partial(train, layout="padded"),
    "train_step_packed": partial(train, layout="packed"),
}
