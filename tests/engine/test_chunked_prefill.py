"""Prompts in chunks: the answers equal those of complete prompts; short requests do not wait."""

import copy
import math
from queue import SimpleQueue

import pytest
import torch

from owl2.engine.engine_core import EngineCore
from owl2.engine.model_runner import ModelRunner
from owl2.engine.prompt_state import PromptChunk, PromptState
from owl2.engine.running_batch import RunningBatch
from owl2.engine.sampling_params import SamplingParams
from owl2.engine.scheduler import Request
from owl2.errors import ErrorCode
from tests.engine.conftest import SCHEMA, ask, caching_engine, random_image, stream_tokens
from tests.engine.test_scheduler import (
    GREEDY,
    IMAGE,
    TOKENS,
    make_prompt,
    make_request,
    text_ids,
)
from tests.errors import raises_input_error
from tests.tiny import KERNELS, PARTIAL_MAM, make_model


@pytest.fixture(scope="module")
def models():
    kept = {}

    def make(**settings):
        if (key := str(settings)) not in kept:
            kept[key] = make_model(initializer_range=0.4, **settings).eval()
        return kept[key]

    return make


@pytest.fixture
def forwards(monkeypatch):
    """The numbers of tokens of the sequences in each forward, in a growing list."""
    counts = []
    forward = ModelRunner.forward

    def record(self, sequences):
        counts.append([len(one.ids) for one in sequences])
        return forward(self, sequences)

    monkeypatch.setattr(ModelRunner, "forward", record)
    return counts


# ------------------------------------------------------------------ chunked equals complete


def chunks_of(prompt, count):
    """The next `count` tokens of a prompt, with all images that may be among them."""
    end = min(prompt.num_computed_tokens + count, prompt.num_tokens)
    return PromptChunk(prompt, end, prompt.new_images)


@pytest.mark.parametrize("use_kernels", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("settings", [{}, {"use_mam": False}, *PARTIAL_MAM], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_logits_and_cache_of_chunks(models, settings, use_kernels, count, monkeypatch):
    if not use_kernels:
        monkeypatch.setattr("owl2.engine.backends.cpu.supports", lambda model: False)
    model = models(**settings, **KERNELS)
    prompt = make_prompt([1, *IMAGE, *text_ids(7), *IMAGE, *IMAGE, 5], 3)
    batch = RunningBatch(model, prefix_bytes=0, image_bytes=0)
    outputs = []
    for size in (len(prompt.ids), count):
        steps = batch.prefill_alone(PromptState(prompt), lambda one, n=size: chunks_of(one, n))
        with pytest.raises(StopIteration) as end:
            for _ in range(100):
                next(steps)
        outputs.append(end.value.value)
    assert batch.image_encoder.num_encoded == 6
    complete, chunked = outputs
    torch.testing.assert_close(chunked.logits, complete.logits, atol=1e-4, rtol=0)
    for own, other in zip(chunked.cache.layers, complete.cache.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(own.values, other.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("budget", "enable_prefix_caching", "settings"),
    [  # all pairs of two values
        (1, True, {}),
        (6, False, {}),
        (6, True, KERNELS),
        (1, False, KERNELS),
        (1, True, {"use_mam": False}),
        (6, False, {"use_mam": False}),
    ],
    ids=str,
)
def test_answers_do_not_depend_on_the_budget(models, settings, enable_prefix_caching, budget):
    model = models(**settings)
    prompts = [
        make_prompt([1, *IMAGE * (index % 3), *text_ids(3 * index + 1, index)], index % 3, index)
        for index in range(7)
    ]
    prompts.append(make_prompt([*prompts[5].ids, 5, 6], 2, 5))
    for params in (GREEDY, SamplingParams(do_sample=True, temperature=1.5, seed=5)):
        expected, chunked = (
            EngineCore(
                model,
                enable_prefix_caching=enable_prefix_caching,
                min_prefix_tokens=4,
                max_num_batched_tokens=tokens,
            ).generate(prompts, params, [TOKENS] * len(prompts), (7,))
            for tokens in (4096, budget)
        )
        assert chunked == expected
    assert len({str(answer) for answer in expected}) > 5


def test_all_kinds_of_requests_in_chunks(shared_engine, conversations):
    engine = caching_engine(shared_engine, max_num_batched_tokens=5)
    options = {"max_new_tokens": TOKENS, "temperature": 2.0, "seed": 4}
    assert engine.batch(conversations, **options) == shared_engine.batch(conversations, **options)
    choices = [["red", "a blue circle"], ["no"]]
    for one, own in zip(conversations[:2], choices, strict=True):
        expected = shared_engine.score(one, own, batch_size=1)
        assert engine.score(one, own, batch_size=1) == pytest.approx(expected, abs=1e-5, rel=1e-6)
    outputs = [
        one.complete(conversations[3], n=3, top_logprobs=2, **options).outputs()
        for one in (shared_engine, engine)
    ]
    for expected, own in zip(*outputs, strict=True):
        assert own.text == expected.text
        assert [token.logprob for token in own.logprobs] == pytest.approx(
            [token.logprob for token in expected.logprobs], abs=1e-4
        )
    structured = {"structured_outputs": {"json": SCHEMA}, "max_new_tokens": 60, "temperature": 0.0}
    assert engine.chat(conversations[2], **structured) == shared_engine.chat(
        conversations[2], **structured
    )


@pytest.mark.parametrize("budget", [0, -3])
def test_invalid_budget(models, budget):
    with raises_input_error(ErrorCode.INVALID_VALUE, "max_num_batched_tokens", budget):
        EngineCore(models(), max_num_batched_tokens=budget)


# ------------------------------------------------------------------ latency


@pytest.mark.parametrize("settings", [{}, KERNELS], ids=["torch", "native"])
def test_a_running_request_gets_a_token_in_each_step_of_a_long_prompt(models, settings, forwards):
    budget, prompt = 8, make_prompt([1, *text_ids(70)])
    core = EngineCore(models(**settings), max_num_batched_tokens=budget)
    events = SimpleQueue()
    running, later = make_request(make_prompt([1, 2, 3]), max_tokens=40), make_request(prompt)
    running.on_token = lambda token, logprobs: (
        events.put("running") or (core.submit([later]) if len(running.token_ids) == 2 else None)
    )
    later.on_token = lambda token, logprobs: events.put("later")
    ended = SimpleQueue()
    running.on_end = later.on_end = ended.put
    core.submit([running])
    assert [ended.get(timeout=60) for _ in range(2)] == [None, None]
    order = [events.get() for _ in range(events.qsize())]
    num_chunks = math.ceil(len(prompt.ids) / (budget - 1))
    assert num_chunks <= order[: order.index("later")].count("running") - 2 <= num_chunks + 1
    assert max(map(sum, forwards)) == budget
    assert core.stats().num_prefill_tokens == len(prompt.ids) + 3


def test_a_score_of_a_long_prompt_does_not_stop_running_requests(models):
    core = EngineCore(models(), max_num_batched_tokens=8)
    stream = stream_tokens(core, make_prompt([1, 2, 3]), 60)
    next(stream)
    before = core.stats().num_decode_steps

    def function(output):
        for _ in range(5):
            yield
        return core.stats().num_decode_steps, output.cache.get_seq_length()

    steps, length = core.run_prefilled(make_prompt([1, *text_ids(70)]), function)
    assert length == 71
    assert steps - before >= 71 // 4 + 5
    assert len(list(stream)) == 59


def test_a_short_prompt_does_not_wait_for_a_long_one(models, forwards):
    core = EngineCore(models(), max_num_batched_tokens=16, enable_prefix_caching=False)
    long, *short = (
        make_request(make_prompt([1, *text_ids(count, count)]), max_tokens=1)
        for count in (120, 5, 6, 7)
    )
    ended = SimpleQueue()
    for request in (long, *short):
        request.on_end = lambda error, one=request: ended.put((error, one))
    core.submit([long, *short])
    order = [ended.get(timeout=60) for _ in range(4)]
    assert [error for error, _ in order] == [None] * 4
    assert [one for _, one in order] == [*short, long]
    assert max(map(len, forwards[:1])) > 1  # the long prompt starts in the first step


# ------------------------------------------------------------------ aborts


@pytest.mark.parametrize("settings", [{}, KERNELS], ids=["torch", "native"])
def test_abort_in_the_middle_of_a_prompt(models, settings):
    model = models(**settings)
    prompt = make_prompt([1, *IMAGE, *text_ids(60)], 1)
    core = EngineCore(model, max_num_batched_tokens=8, min_prefix_tokens=4)
    running = make_request(make_prompt([1, 2, 3]), max_tokens=50)
    aborted, other = make_request(prompt), make_request(make_prompt([1, *text_ids(50, 4)]))

    def on_token(token, logprobs):
        if len(running.token_ids) == 2:
            core.submit([aborted, other])
        if len(running.token_ids) == 6:
            assert 0 < aborted.prompt.num_computed_tokens < len(prompt.ids)
            aborted.aborted = True

    ended = SimpleQueue()
    running.on_token = on_token
    running.on_end = other.on_end = ended.put
    core.submit([running])
    assert [ended.get(timeout=60) for _ in range(2)] == [None, None]
    assert aborted.token_ids == []
    for request in (running, other):
        whole = EngineCore(model, enable_prefix_caching=False)
        [expected] = whole.generate([request.prompt.prepared], GREEDY, [request.max_tokens], ())
        assert request.token_ids == expected
    # What was computed of the prompt is not computed again.
    before = core.stats().num_prefill_tokens
    [answer] = core.generate([prompt], GREEDY, [TOKENS], ())
    assert core.stats().num_prefill_tokens - before < len(prompt.ids)
    whole = EngineCore(model, enable_prefix_caching=False)
    assert whole.generate([prompt], GREEDY, [TOKENS], ()) == [answer]


def test_another_answer_continues_the_prompt_of_an_aborted_one(models):
    prompt = PromptState(make_prompt([1, *IMAGE, *text_ids(9)], 1))
    requests = [
        Request(prompt, GREEDY, TOKENS, (), torch.device("cpu"), index) for index in range(3)
    ]
    batch = RunningBatch(models(), prefix_bytes=0, image_bytes=0)
    batch.add(requests)
    batch.step([chunks_of(prompt, 6)])
    requests[0].aborted = True
    batch.remove_finished()
    assert batch.requests == requests[1:]
    batch.step([chunks_of(prompt, 20)])
    while batch.requests:
        batch.step()
    [expected] = EngineCore(models()).generate([prompt.prepared], GREEDY, [TOKENS], ())
    assert [one.token_ids for one in requests] == [[], expected, expected]
    assert (batch.stats.num_prefills, batch.image_encoder.num_encoded) == (1, 1)


def test_an_engine_with_the_option(shared_engine):
    model = copy.deepcopy(shared_engine.model)
    engine = type(shared_engine)(model, shared_engine.processor, max_num_batched_tokens=4)
    question = ask("what is this?", random_image(1))
    expected = shared_engine.chat(question, max_new_tokens=TOKENS)
    assert engine.chat(question, max_new_tokens=TOKENS) == expected
    stats = engine.stats()
    assert (stats.num_prefills, stats.num_decode_steps) == (1, TOKENS - 1)
