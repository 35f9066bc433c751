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


def _forward(model: Any, *inputs: torch.Tensor, **options: Any) -> Run:
    return Run(lambda: torch.no_grad()(model)(*inputs, **options))


def _decoding(runner: TransformersDecodeRunner) -> Run:
    return Run(partial(runner.decode, NEW_TOKENS), NEW_TOKENS * runner.rows)


def _step_bytes(on: Implementations) -> float:
    return decode_bytes(on.model, on.model.dtype.itemsize)


def owl2_encode(on: Implementations, count: int) -> BenchCase:
    """Images through the vision encoder and the abstractor in one batch."""
    runs = {"owl2": _forward(on.model.get_image_features, on.workload.pixels(count))}
    return BenchCase("ms", runs, on.roofline.seconds(count * on.image_flops))


def owl2_prefill(on: Implementations, requests: Sequence[BenchRequest]) -> BenchCase:
    """Prompts in a batch, to their first tokens, without caches across requests."""
    runner = PrefillRunner(on.model)

    def owl2() -> None:
        runner.run([on.engine.prepare(r.ids[0].tolist(), r.pixel_values) for r in requests])

    images = sum(len(r.pixel_values) for r in requests if r.pixel_values is not None)
    flops = sum(decoder_flops(on.model, request.ids.shape[1]) for request in requests)
    seconds = on.roofline.seconds(flops + images * on.image_flops, _step_bytes(on))
    return BenchCase("ms", {"owl2": Run(owl2)}, seconds)


def owl2_decode(on: Implementations, request: BenchRequest, rows: int) -> BenchCase:
    """Greedy decoding of sequences in a batch. The limit includes the reading of the KV cache."""
    runs = {"owl2": _decoding(DecodeRunner(on.model, request, rows))}
    length = request.ids.shape[1] + NEW_TOKENS // 2  # on average
    flops = rows * decoder_flops(on.model, 1, cached=length)
    read = _step_bytes(on) + cache_bytes(on.model, rows * length)
    return BenchCase("tokens/s", runs, NEW_TOKENS * on.roofline.seconds(flops, read))


def encode(on: Implementations) -> BenchCase:
    """Eight images through the vision encoder and the abstractor in one batch."""
    case = owl2_encode(on, BATCH_SIZE)
    baseline = _forward(on.baseline.get_image_features, on.workload.pixels(BATCH_SIZE))
    return replace(case, runs={"baseline": baseline, **case.runs})


def prefill(on: Implementations, count: int) -> BenchCase:
    """Prompts with an image and 64 text tokens in a batch, to the first token.

    The baseline processes them one by one.
    """
    requests = [on.workload.request() for _ in range(count)]
    ids = torch.cat([request.ids for request in requests])
    text = on.workload.text_ids(ids.numel()).view_as(ids)
    case = owl2_prefill(on, requests)

    @torch.no_grad()
    def baseline() -> None:
        for request in requests:
            on.baseline(request.ids, request.pixel_values, use_cache=True)

    llama = _forward(on.llama, text, use_cache=True, logits_to_keep=1)
    return replace(case, runs={"baseline": Run(baseline), **case.runs, "llama": llama})


def second_question(on: Implementations) -> BenchCase:
    """Time to the first token of a second question about an image.

    Each round has a new image. `first` is the first question about it.
    """
    cached = TEXT_TOKENS - QUESTION_TOKENS + on.model.config.num_image_tokens
    prompt = on.workload.prompt_ids()
    pixels = on.workload.pixels()

    def request() -> BenchRequest:
        question = on.workload.text_ids(QUESTION_TOKENS)
        return BenchRequest(torch.cat([prompt[:, :cached], question], dim=1), pixels, 1)

    def first() -> None:
        nonlocal pixels
        pixels = pixels.flip(-1) + 1e-2
        generate(on.engine, [request()])

    runs = {
        "first": Run(first),
        "owl2": Run(lambda: generate(on.engine, [request()])),
        "baseline": Run(lambda: TransformersDecodeRunner(on.baseline, request())),
    }
    flops = decoder_flops(on.model, QUESTION_TOKENS, cached=cached)
    return BenchCase("ms", runs, on.roofline.seconds(flops, _step_bytes(on)))


def decode(on: Implementations, rows: int = 1, int8: bool = False) -> BenchCase:
    """Greedy decoding of sequences in a batch after an image and 64 text tokens.

    The throughput of the baseline, and of `single` for several sequences, is that of one sequence.

    Args:
        int8: 8-bit weights in owl2's decoder, without a comparison with LLaMA.
    """
    request = on.workload.request()
    runs = {
        "baseline": _decoding(TransformersDecodeRunner(on.baseline, request)),
        "owl2": _decoding(DecodeRunner(on.int8 if int8 else on.model, request, rows)),
    }
    if not int8:
        text = BenchRequest(on.workload.text_ids(request.ids.shape[1]))
        runs["llama"] = _decoding(TransformersDecodeRunner(on.llama, text, rows))
    if rows > 1:
        runs["single"] = _decoding(DecodeRunner(on.model, request))
    flops = rows * decoder_flops(on.model, 1, cached=request.ids.shape[1])
    read = decode_bytes(on.model, 1 if int8 else on.model.dtype.itemsize)
    return BenchCase("tokens/s", runs, NEW_TOKENS * on.roofline.seconds(flops, read))


def generate_mixed(on: Implementations) -> BenchCase:
    """Sixteen requests of different lengths, some with an image, with 16 to 91 new tokens."""
    requests = on.workload.requests()
    tokens = sum(request.limit for request in requests)

    def baseline() -> None:
        for request in requests:
            TransformersDecodeRunner(on.baseline, request).decode(request.limit - 1)

    def sequential() -> None:
        for request in requests:
            generate(on.engine_without_caches, [request])

    runs = {
        "baseline": Run(baseline, tokens),
        "owl2": Run(lambda: generate(on.engine_without_caches, requests), tokens),
        "sequential": Run(sequential, tokens),
    }
    images = sum(request.pixel_values is not None for request in requests)
    flops = sum(decoder_flops(on.model, request.ids.shape[1]) for request in requests)
    # After the prefill, as many steps as the longest answer has tokens.
    steps = max(request.limit for request in requests) - 1
    seconds = on.roofline.seconds(flops + images * on.image_flops)
    seconds += steps * on.roofline.seconds(read=_step_bytes(on))
    return BenchCase("tokens/s", runs, seconds, max_rounds=2, warm_up={"owl2"})


def mam_decode(on: Implementations) -> BenchCase:
    """Decoding with MAM and, by the same code, without it."""
    request = BenchRequest(on.workload.text_ids(TEXT_TOKENS + on.model.config.num_image_tokens))
    runs = {
        "owl2": _decoding(DecodeRunner(on.model, request)),
        "no_mam": _decoding(DecodeRunner(on.no_mam, request)),
        "llama": _decoding(TransformersDecodeRunner(on.llama, request)),
    }
    seconds = NEW_TOKENS * on.roofline.seconds(read=_step_bytes(on))
    return BenchCase("tokens/s", runs, seconds, ratio=("owl2", "no_mam"))


def mam_prefill(on: Implementations) -> BenchCase:
    """An encoded image and 64 text tokens through the decoder, with and without MAM."""
    ids, pixels, _ = on.workload.request()
    prompt = on.engine.prepare(ids[0].tolist(), pixels)
    text = on.workload.text_ids(ids.shape[1])
    owl2, no_mam = (PrefillRunner(model, feature_bytes=1 << 30) for model in (on.model, on.no_mam))
    runs = {
        "owl2": Run(lambda: owl2.run([prompt])),
        "no_mam": Run(lambda: no_mam.run([prompt])),
        "llama": _forward(on.llama, text, use_cache=True, logits_to_keep=1),
    }
    seconds = on.roofline.seconds(decoder_flops(on.model, ids.shape[1]))
    return BenchCase("ms", runs, seconds, ratio=("owl2", "no_mam"))


def train_memory(on: Implementations) -> BenchCase:
    """Peak memory of two training steps, each implementation in its own process.

    owl2 uses `gradient_checkpointing: selective`, as in all cases; `no_checkpointing` and
    `full_checkpointing` use `false` and `true`.
    """
    runs = {name: Run(partial(measure_memory, name, on.source)) for name in MEMORY_STEPS}
    return BenchCase("MiB", runs, ratio=("owl2", "baseline"), max_rounds=1)


def train(on: Implementations, layout: str) -> BenchCase:
    """A training step on eight samples of different lengths, padded to the longest or packed.

    The baseline pads.
    """
    runs = {
        "baseline": Run(on.training.baseline_step),
        "owl2": Run(partial(on.training.step, layout)),
    }
    batch = on.training.batches["padded"]
    lengths = batch["attention_mask"].sum(1).tolist()
    labels = int((batch["labels"] != IGNORE_INDEX).sum())
    flops = training_flops(on.model, lengths, labels, len(batch["pixel_values"]) * on.image_flops)
    return BenchCase("ms", runs, on.roofline.seconds(flops), max_rounds=3)


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
