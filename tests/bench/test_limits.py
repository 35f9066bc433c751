"""The limits of the cases: the time for FLOPs and memory reads at the limits of a machine."""

from functools import partial

import pytest

from owl2.bench.cases import NEW_TOKENS, decode, generate_mixed
from owl2.bench.flops import decoder_flops
from owl2.bench.implementations import Implementations
from owl2.bench.measure import Roofline
from owl2.bench.presets import BenchModel

FAST = 1e30


def implementations(matmul, read):
    return Implementations(BenchModel(size="tiny", dtype="float32"), Roofline(matmul, read))


def test_decoding_reads_the_weights_once_and_the_cache_of_each_sequence():
    impls = implementations(FAST, read=1.0)
    config, model = impls.model.config, impls.model
    of_layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * of_layer + model.lm_head.weight.numel()
    length = impls.workload.request().ids.shape[1] + NEW_TOKENS // 2
    cache = 2 * length * config.hidden_size * config.num_hidden_layers
    assert decode(impls, rows=3).min_seconds == NEW_TOKENS * 4 * (weights + 3 * cache)
    assert decode(impls, int8=True).min_seconds == NEW_TOKENS * (weights + 4 * cache)


def test_the_products_of_a_step_limit_many_sequences():
    impls = implementations(1.0, FAST)
    length = impls.workload.request().ids.shape[1] + NEW_TOKENS // 2
    flops = 16 * decoder_flops(impls.model, 1, cached=length)
    assert decode(impls, rows=16).min_seconds == pytest.approx(NEW_TOKENS * flops)


def test_mixed_requests_compute_each_token_once():
    impls = implementations(1.0, FAST)
    requests = impls.workload.requests()
    # The last token of an answer is not computed.
    lengths = [request.ids.shape[1] + request.limit - 1 for request in requests]
    logits = [request.limit for request in requests]
    flops = sum(map(partial(decoder_flops, impls.model), lengths, logits))
    images = sum(request.pixel_values is not None for request in requests)
    expected = flops + images * impls.image_flops
    assert generate_mixed(impls).min_seconds == pytest.approx(expected)
