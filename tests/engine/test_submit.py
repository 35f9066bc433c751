"""Completions that are closed or aborted, submitted requests, and the threads of a server."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from owl2.engine import engine_core
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.runtime import openmp_library
from tests.engine.conftest import ask, random_image
from tests.engine.test_output import SAMPLED, TOKENS, join_chunks
from tests.errors import raises_input_error
from tests.tiny import make_model

TASKS = Path("/proc/self/task")


@pytest.fixture
def endless(engine):
    """An engine whose answers may become very long."""
    engine.model.config.max_position_embeddings = 100_000
    return engine


def test_close_from_another_thread(endless, conversations, batch_sizes):
    completion = endless.complete(conversations[0], max_new_tokens=90_000)
    chunks, has_some = [], threading.Event()

    def iterate():
        for chunk in completion:
            chunks.append(chunk)
            has_some.set()

    thread = threading.Thread(target=iterate)
    thread.start()
    assert has_some.wait(20)
    completion.close()
    thread.join(20)
    assert not thread.is_alive()
    assert chunks[-1].finish_reason is None
    assert list(completion) == []
    assert endless.chat(conversations[0], max_new_tokens=1)
    batch_sizes.clear()
    assert endless.chat(conversations[0], max_new_tokens=3)
    assert batch_sizes == [1, 1]


def test_outputs_of_a_closed_completion(endless, conversations, gate):
    completion = endless.complete(conversations[0], max_new_tokens=90_000)
    with ThreadPoolExecutor(1) as threads:
        outputs = threads.submit(completion.outputs)
        assert gate.reached.wait(20)
        completion.close()
        with pytest.raises(CancelledError):
            outputs.result(20)
    with endless.complete(conversations[0]) as closed:
        pass
    with pytest.raises(CancelledError):
        closed.outputs()


def test_a_request_aborted_while_it_waits_never_starts(endless, conversations, gate):
    endless.core.max_num_seqs = 1
    abort_running, _ = submit(endless, conversations[0], max_new_tokens=90_000)
    assert gate.reached.wait(20)
    abort_waiting, outputs = submit(endless, conversations[4])
    abort_waiting()
    abort_running()
    gate.open()
    assert endless.chat(conversations[1], max_new_tokens=1)
    assert endless.stats().num_prefills == 2
    assert outputs.empty()


def test_a_completion_without_references_ends(engine, conversations, batch_sizes):
    with engine.complete(conversations[0], max_new_tokens=90) as completion:
        next(completion)
    assert list(completion) == []
    next(engine.complete(conversations[0], max_new_tokens=90))
    stream = engine.stream(conversations[0], max_new_tokens=90)
    next(stream)
    stream.close()
    engine.chat(conversations[1], max_new_tokens=1)
    assert len(batch_sizes) < 80
    batch_sizes.clear()
    assert engine.chat(conversations[1], max_new_tokens=3)
    assert batch_sizes == [1, 1]


def test_a_completion_that_is_not_iterated_computes_nothing(engine, conversations):
    completion = engine.complete(conversations[0])
    completion.close()
    assert list(completion) == []
    engine.complete(conversations[0])
    engine.stream(conversations[0])
    assert engine.stats().num_prefills == 0


# ------------------------------------------------------------------ submit


def submit(engine, messages, **options):
    """The function that aborts a submitted request, and the queue of its outputs."""
    outputs = SimpleQueue()
    prompt = engine.encode(messages)
    return engine.submit(prompt, engine.sampling_params(**options), outputs.put), outputs


def test_submit_passes_the_chunks_of_complete(shared_engine, conversations):
    options = {"n": 3, "max_new_tokens": TOKENS, "top_logprobs": 1, "stop": "e", **SAMPLED}
    _, outputs = submit(shared_engine, conversations[2], **options)
    chunks = []
    while sum(chunk.finish_reason is not None for chunk in chunks) < 3:
        chunks.append(outputs.get(timeout=20))
    completion = shared_engine.complete(conversations[2], **options)
    texts = dict.fromkeys(range(3), "")
    for chunk in chunks:
        texts[chunk.index] += chunk.text
    assert texts == join_chunks(completion)[0]
    assert outputs.empty()


def test_nothing_is_passed_after_abort(endless, conversations):
    abort, outputs = submit(endless, conversations[0], max_new_tokens=90_000)
    outputs.get(timeout=20)
    abort()
    assert endless.chat(conversations[1], max_new_tokens=3)  # a later step
    while not outputs.empty():
        assert outputs.get().finish_reason is None
    assert endless.chat(conversations[1], max_new_tokens=3)
    assert outputs.empty()


def test_an_error_is_passed_once(nan_engine, conversations):
    _, outputs = submit(nan_engine, conversations[0], n=3)
    assert outputs.get(timeout=20).code is ErrorCode.NON_FINITE
    with raises_input_error(ErrorCode.NON_FINITE):
        nan_engine.chat(conversations[0])
    assert outputs.empty()


# ------------------------------------------------------------------ threads of a server


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads as Linux does")
def test_threads_that_submit_start_no_openmp_threads(shared_engine):
    model = make_model(vision={"image_size": 448, "patch_size": 14}, vocab_size=320)
    tokenizer = shared_engine.processor.tokenizer
    processor = Owl2Processor(Owl2ImageProcessor(448), tokenizer, num_image_tokens=3)
    engine = Engine(model, processor)
    images = random_image(0, (300, 500)), random_image(1, (448, 448))
    questions = [ask("what is this? " * 20, *images)] * 4

    def count_new_threads(work):
        before = len(list(TASKS.iterdir()))
        done, counted = threading.Barrier(5), threading.Barrier(5)

        def run(question):
            work(question)
            done.wait(60)
            counted.wait(60)

        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(run, question) for question in questions]
            done.wait(60)
            count = len(list(TASKS.iterdir())) - before
            counted.wait(60)
            for one in runs:
                one.result()
        return count

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert count_new_threads(lambda one: engine.complete(one, temperature=1.0, seed=1)) == 4
        assert count_new_threads(lambda one: torch.ones(1000, 1000).add_(1)) > 4
    finally:
        torch.set_num_threads(usual)


@pytest.mark.skipif(not openmp_library(), reason="libgomp is not loaded")
@pytest.mark.parametrize(("max_weight", "expected"), [(2**18, 1), (10, 2)])
def test_one_thread_computes_a_small_model(shared_engine, monkeypatch, max_weight, expected):
    """Its operations are shorter than waiting for other threads; other threads keep theirs."""
    monkeypatch.setattr(engine_core, "MAX_SMALL_WEIGHT", max_weight)
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = Engine(shared_engine.model, shared_engine.processor)
        prompt = engine.encode(ask("what is this?"))
        assert engine.run_prefilled(prompt, lambda _: torch.get_num_threads()) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)
