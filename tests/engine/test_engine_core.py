"""Concurrent requests: answers equal those alone; aborts, errors, threads, forks."""

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from owl2 import memory
from owl2.engine import hf_generate
from owl2.engine.engine_core import EngineCore
from owl2.engine.model_runner import ModelRunner
from owl2.engine.prompt_state import PromptState
from owl2.engine.sampler import sample
from owl2.engine.sampling_params import SamplingParams
from owl2.engine.scheduler import Request
from owl2.errors import ErrorCode
from owl2.processing.prepared_prompt import PreparedPrompt
from tests.engine.conftest import caching_engine, stream_tokens
from tests.errors import raises_input_error
from tests.forks import run_in_fork
from tests.tiny import KERNELS, PARTIAL_MAM, make_model

TOKENS = 10
IMAGE = [40] * 3
GREEDY = SamplingParams()


def make_prompt(ids, pixels=None):
    return PreparedPrompt.from_ids(ids, pixels, image_token_id=40, num_image_tokens=3)


@pytest.fixture(scope="module")
def model():
    # Large weights, so that answers differ from prompt to prompt.
    return make_model(initializer_range=0.4).eval()


@pytest.fixture(scope="module")
def prompts():
    """20 prompts of 0, 1 and 2 images, some of them equal, and 2 to 40 ids."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(3, 3, 8, 8, generator=generator)
    result = []
    for index in range(20):
        text = torch.randint(1, 40, (2 * index + 2,), generator=generator).tolist()
        count = index % 3
        images = pixels[index % 2 :][:count] if count else None
        result.append(make_prompt([1, *IMAGE * count, *text], images))
    result[7] = make_prompt([*result[6].ids[:9], 5, 6], result[6].pixel_values)
    return result


@pytest.fixture(scope="module")
def alone(model, prompts):
    """The answers of transformers' `generate`, without batches and caches."""
    return [generate_alone(model, prompt) for prompt in prompts]


def generate_by_transformers(model, prompts, params=GREEDY, limits=None, end_ids=(7,)):
    requests = [
        Request(PromptState(prompt), params, limit, end_ids, model.device, index)
        for index, (prompt, limit) in enumerate(
            zip(prompts, limits or [TOKENS] * len(prompts), strict=True)
        )
    ]
    hf_generate.generate(model, requests)
    return [request.token_ids for request in requests]


def generate_alone(model, prompt, end_ids=(7,)):
    return generate_by_transformers(model, [prompt], end_ids=end_ids)[0]


def generate(core, prompts, params=GREEDY, end_ids=(7,)):
    return core.generate(prompts, params, [TOKENS] * len(prompts), end_ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 3},
        {"max_num_seqs": 1},
        {"prefix_cache_bytes": 5_000, "image_cache_bytes": 300},
        {"prefix_cache_bytes": 0},
        {"image_cache_bytes": 0},
    ],
    ids=str,
)
def test_batched_answers_equal_those_alone(model, prompts, alone, options):
    core = EngineCore(model, min_prefix_tokens=1 if options else 6, **options)
    assert len({str(answer) for answer in alone}) > 12
    assert len({len(answer) for answer in alone}) > 2, "all answers have the same length"
    assert generate(core, prompts) == alone
    assert generate(core, prompts[::-1])[::-1] == alone
    if not options:  # the streams are single requests as well
        assert [generate(core, [prompt])[0] for prompt in prompts] == alone
    assert [list(stream_tokens(core, prompt, TOKENS, {7})) for prompt in prompts] == alone


def test_caches_fit_into_the_memory_of_a_container(model, prompts, monkeypatch):
    for available, is_cached in ((100, False), (10**9, True)):
        limits = {memory.MEMORY: 10**12, memory.CGROUP: available}
        monkeypatch.setattr(memory, "memory_limits", lambda limits=limits: limits)
        core = EngineCore(model, min_prefix_tokens=1)
        generate(core, prompts)
        stats = core.stats()
        assert bool(stats.prefix_cache_bytes) == bool(stats.image_cache_bytes) == is_cached


@pytest.mark.parametrize(
    "settings",
    [{"use_mam": False}, *PARTIAL_MAM, KERNELS, *(part | KERNELS for part in PARTIAL_MAM)],
    ids=str,
)
def test_batched_answers_of_other_models(prompts, settings):
    model = make_model(initializer_range=0.4, **settings).eval()
    assert ModelRunner(model).uses_cpu_kernels == ("hidden_size" in settings)
    alone = [generate_alone(model, prompt) for prompt in prompts]
    core = EngineCore(model, min_prefix_tokens=1)
    assert generate(core, prompts) == generate(core, prompts) == alone


def test_hf_generate_batches(model, prompts, alone):
    assert generate_by_transformers(model, prompts) == alone
    cut = generate_by_transformers(model, prompts[:2], limits=[2, TOKENS], end_ids=())[0]
    assert cut == alone[0][:2]
    sampled = SamplingParams(do_sample=True, temperature=1.5, seed=3)
    expected = generate(EngineCore(model), prompts, sampled)
    assert generate_by_transformers(model, prompts, sampled) == expected


def test_each_request_has_its_own_limit(model, prompts, alone):
    limits = [1 + index % TOKENS for index in range(len(prompts))]
    expected = [answer[:limit] for answer, limit in zip(alone, limits, strict=True)]
    assert EngineCore(model).generate(prompts, GREEDY, limits, {7}) == expected


def test_a_request_joins_a_running_batch(model, prompts, alone, batch_sizes, gate):
    core = EngineCore(model)
    stream = stream_tokens(core, prompts[0], 60)
    first = next(stream)
    assert gate.reached.wait(20)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(generate, core, prompts[1:5])
        gate.open()
        assert later.result(30) == alone[1:5]
    assert max(batch_sizes) > 1, "the requests were not computed together"
    uncached = EngineCore(model, enable_prefix_caching=False)
    assert [first, *stream] == list(stream_tokens(uncached, prompts[0], 60))


def test_sampled_answers_do_not_depend_on_the_batch(model, prompts):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    batched = generate(EngineCore(model), prompts, SamplingParams(**options, seed=5))
    uncached = EngineCore(model, enable_prefix_caching=False)
    for index, prompt in enumerate(prompts):
        own = SamplingParams(**options, seed=5 + index)
        assert generate(uncached, [prompt], own) == [batched[index]]
    equal_prompts = [prompts[3]] * 4
    assert (
        generate(EngineCore(model), equal_prompts, SamplingParams(**options, seed=5))
        != [batched[3]] * 4
    )


def test_similar_prompts_share_a_forward(model, prompts, forward_shapes):
    core = EngineCore(model, max_num_seqs=128, max_num_batched_tokens=1000)
    generate(core, [prompts[index % 2] for index in range(90)])
    assert [rows for rows, length in forward_shapes if length > 1] == [90]


def test_questions_about_a_new_image_share_its_computation(model, prompts, forward_shapes):
    core = EngineCore(model, min_prefix_tokens=4)
    pixels = prompts[1].pixel_values
    core.generate(
        [make_prompt([1, *IMAGE, 5, 6, last], pixels) for last in range(8, 14)], GREEDY, [1] * 6, ()
    )
    assert forward_shapes == [(1, 7), (5, 1)]
    assert core.stats().num_encoded_images == 1


@pytest.fixture
def forward_shapes(model):
    """Batch size and length of each forward of the decoder."""
    shapes = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape[:2]))
    )
    yield shapes
    handle.remove()


def test_a_prompt_that_ends_with_a_cached_image(model, prompts):
    prompt = make_prompt([1, 5, *IMAGE], prompts[1].pixel_values)
    core = EngineCore(model, min_prefix_tokens=1)
    expected = [generate_alone(model, prompt)]
    assert [generate(core, [prompt]) for _ in range(2)] == [expected] * 2


# ------------------------------------------------------------------ aborts and errors


def test_closing_a_stream_frees_its_row(model, prompts, alone, batch_sizes):
    core = EngineCore(model, max_num_seqs=1)
    stream = stream_tokens(core, prompts[0], 100_000)
    next(stream)
    stream.close()
    assert generate(core, prompts[:3]) == alone[:3]
    assert len(batch_sizes) < 10_000


def test_an_interrupted_call_frees_its_rows(model, prompts, alone, monkeypatch):
    core = EngineCore(model, max_num_seqs=2)

    class InterruptedQueue:
        def get(self):
            raise KeyboardInterrupt

        def put(self, item):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("owl2.engine.engine_core.SimpleQueue", InterruptedQueue)
        with pytest.raises(KeyboardInterrupt):
            core.generate(prompts[:2], GREEDY, [100_000] * 2, ())
    assert generate(core, prompts) == alone


def test_an_error_of_one_sequence_does_not_reach_the_others(model, prompts, monkeypatch):
    forward = ModelRunner.forward
    victim, other = prompts[2], prompts[18]

    def spoil(self, sequences):
        logits = forward(self, sequences)
        positions = torch.tensor([one.start for one in sequences if one.has_logits])
        # Only the victim reaches this position: the prompts have different lengths.
        return torch.where((positions == 3 + len(victim.ids))[:, None], float("nan"), logits)

    expected = generate_alone(model, other, ())
    monkeypatch.setattr(ModelRunner, "forward", spoil)
    core = EngineCore(model)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(generate, core, [prompt], GREEDY, ()) for prompt in (other, victim)]
        assert answers[0].result(30) == [expected]
        with raises_input_error(ErrorCode.NON_FINITE, "token 5 of the answer"):
            answers[1].result(30)


@pytest.mark.parametrize("method", [(EngineCore, "on_step"), (ModelRunner, "forward")], ids=str)
def test_an_error_of_the_machine_ends_all_requests_but_not_the_engine(
    model, prompts, alone, monkeypatch, method
):
    core = EngineCore(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(*method, fail)
        answers = [
            pool.submit(core.generate, [prompt], GREEDY, [2_000], ()) for prompt in prompts[:4]
        ]
        for answer in answers:
            with pytest.raises(RuntimeError, match="out of memory"):
                answer.result(30)
    assert generate(core, prompts) == alone


def test_an_error_of_a_job_reaches_its_caller(model, prompts, alone):
    core = EngineCore(model)

    def fail(output):
        raise KeyError("job")

    with pytest.raises(KeyError, match="job"):
        core.run_prefilled(prompts[0], fail)
    assert generate(core, prompts) == alone


@pytest.mark.parametrize(
    ("ids", "num_images", "crop", "code", "needle"),
    [
        ((1, 41), 0, 8, ErrorCode.INVALID_VALUE, 41),
        ((1, -200), 0, 8, ErrorCode.INVALID_VALUE, -200),
        ((1, *IMAGE, 2), 0, 8, ErrorCode.IMAGE_COUNT_MISMATCH, "3 image tokens"),
        ((1, 2), 1, 8, ErrorCode.IMAGE_COUNT_MISMATCH, "1 image"),
        ((1, *IMAGE, 2), 1, 4, ErrorCode.SHAPE_MISMATCH, "(1, 3, 8, 4)"),
        ((), 0, 8, ErrorCode.EMPTY_MESSAGE, "token"),
    ],
)
def test_invalid_prompts(model, prompts, ids, num_images, crop, code, needle):
    pixels = prompts[1].pixel_values[..., :crop] if num_images else None
    with raises_input_error(code, needle):
        EngineCore(model).prepare(ids, pixels)


# ------------------------------------------------------------------ threads and processes


def test_eight_threads_at_once(shared_engine, conversations):
    engine = caching_engine(shared_engine, min_prefix_tokens=4)
    options = {"max_new_tokens": TOKENS}
    sampled = {"max_new_tokens": TOKENS, "temperature": 2.0, "seed": 4}
    expected = [
        (
            shared_engine.chat(one, **options),
            shared_engine.chat(one, **sampled),
            shared_engine.score(one, ["red", "no"]),
        )
        for one in conversations
    ]

    def work(thread):
        for index in range(thread, thread + 5):
            one = conversations[index % len(conversations)]
            greedy, drawn, scores = expected[index % len(conversations)]
            for text in engine.stream(one, max_new_tokens=90):
                if text and thread % 2:
                    break
            assert engine.chat(one, **options) == greedy
            assert "".join(engine.stream(one, **options)) == greedy
            assert engine.chat(one, **sampled) == drawn
            assert engine.batch([one, one], **options) == [greedy] * 2
            assert engine.score(one, ["red", "no"]) == pytest.approx(scores, abs=1e-5, rel=1e-6)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_all_work_happens_in_one_thread(model, prompts, step_hooks):
    threads = set()
    step_hooks.append(lambda num_running: threads.add(threading.current_thread().name))
    core = EngineCore(model)
    generate(core, prompts[:2])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda prompt: generate(core, [prompt]), prompts[:4]))
    assert threads == {"owl2-engine"}


def test_an_idle_thread_does_not_keep_the_model(prompts):
    core = EngineCore(make_model(seed=1).eval())
    before = threading.active_count()
    generate(core, prompts[:2])
    [thread] = [one for one in threading.enumerate() if one.name == "owl2-engine"][-1:]
    model = weakref.ref(core.model)
    del core
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert threading.active_count() <= before
    assert model() is None


def test_a_fork_and_its_parent_both_continue(model, prompts, alone):
    core = EngineCore(model)
    assert generate(core, prompts[:2]) == alone[:2]
    stream = stream_tokens(core, prompts[0], TOKENS)
    next(stream)

    def answer_again():
        threading.Timer(60, os._exit, [2]).start()
        assert generate(core, prompts[:2]) == alone[:2]

    assert run_in_fork(answer_again) == 0
    assert generate(core, prompts) == alone


# ------------------------------------------------------------------ sampling


def test_sample_returns_none_for_logits_that_are_not_finite():
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 6)
    logits[1, 0] = float("nan")
    logits[2, 2] = float("inf")
    logits[3] = float("-inf")
    logits[4, 1] = float("-inf")
    assert sample(logits, [GREEDY] * 6, [None] * 6) == [1, None, None, None, 2, 1]
    top_1 = SamplingParams(do_sample=True, top_k=1, seed=1)
    generator = top_1.generator(0, logits.device)
    assert sample(logits, [top_1] * 6, [generator] * 6) == [1, None, None, None, 2, 1]
