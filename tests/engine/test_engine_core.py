"""Many requests at once: each gets the answer it would get alone; leaving, failing, threads."""

import subprocess
import sys
import textwrap
import threading
import time
import weakref
from functools import partial

import pytest
import torch

from owl2.engine import hf_generate
from owl2.engine.engine import Engine
from owl2.engine.engine_core import Prompt, Runner
from owl2.engine.model_runner import FastDecoder
from owl2.engine.sampling import SamplingParams, sample
from owl2.errors import InputError
from tests.engine.conftest import ask, image
from tests.tiny import make_model

TOKENS = 10
IMAGE = [40] * 3
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def model():
    # Weights far from 0, so that answers differ from prompt to prompt.
    return make_model(initializer_range=0.4).eval()


@pytest.fixture(scope="module")
def prompts():
    """20: of 0, 1 and 2 images, some of the same; 2 to 40 ids."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(3, 3, 8, 8, generator=generator)
    made = []
    for number in range(20):
        words = torch.randint(1, 40, (2 * number + 2,), generator=generator).tolist()
        images = number % 3
        ids = [1, *IMAGE * images, *words]
        made.append(Prompt(tuple(ids), pixels[number % 2 :][:images] if images else None))
    made[7] = Prompt((*made[6].ids[:9], 5, 6), made[6].pixel_values)
    return made


@pytest.fixture(scope="module")
def alone(model, prompts):
    """The answers without any batch, cache or fast path."""
    return [hf_generate.generate(model, [prompt], GREEDY, [TOKENS], {7})[0] for prompt in prompts]


def run(runner, prompts, decoding=GREEDY, ends=(7,)):
    return runner.generate(prompts, decoding, [TOKENS] * len(prompts), ends)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reuse": False},
        {"max_batch": 3},
        {"max_batch": 1},
        {"prefix_bytes": 5_000, "feature_bytes": 300},
        {"prefix_bytes": 0},
        {"feature_bytes": 0},
    ],
    ids=str,
)
def test_together_as_alone(model, prompts, alone, options):
    runner = Runner(model, **options)
    runner.reader.prefixes.shortest = 1 if options else 6
    assert len({str(answer) for answer in alone}) > 12
    assert len({len(answer) for answer in alone}) > 2, "all answers are equally long"
    for _ in range(2):
        assert run(runner, prompts) == alone
    assert run(runner, prompts[::-1])[::-1] == alone
    assert [run(runner, [prompt])[0] for prompt in prompts] == alone
    streamed = [list(runner.stream(prompt, GREEDY, TOKENS, {7})) for prompt in prompts]
    assert streamed == alone


def test_without_mam(prompts):
    model = make_model(initializer_range=0.4, use_mam=False).eval()
    alone = [hf_generate.generate(model, [prompt], GREEDY, [TOKENS], {7})[0] for prompt in prompts]
    runner = Runner(model)
    runner.reader.prefixes.shortest = 1
    assert run(runner, prompts) == run(runner, prompts) == alone


def test_plain_batches_too(model, prompts, alone):
    limits = [TOKENS] * len(prompts)
    assert hf_generate.generate(model, prompts, GREEDY, limits, {7}) == alone
    limits[0] = 2
    assert hf_generate.generate(model, prompts[:2], GREEDY, limits[:2], ())[0] == alone[0][:2]
    drawn = SamplingParams(do_sample=True, temperature=1.5, seed=3)
    assert hf_generate.generate(model, prompts, drawn, [TOKENS] * 20, {7}) == run(
        Runner(model), prompts, drawn
    )


def test_limits_are_each_ones_own(model, prompts, alone):
    limits = [1 + number % TOKENS for number in range(len(prompts))]
    expected = [answer[:limit] for answer, limit in zip(alone, limits, strict=True)]
    assert Runner(model).generate(prompts, GREEDY, limits, {7}) == expected


def test_who_joins_late_gets_the_same(model, prompts, alone, steps):
    runner = Runner(model)
    stream = runner.stream(prompts[0], GREEDY, 60, ())
    started = [next(stream) for _ in range(3)]
    assert run(runner, prompts[1:5]) == alone[1:5]
    assert max(steps) > 1, "they were not together"
    rest = started + list(stream)
    assert rest == list(
        Runner(model, enable_prefix_caching=False).stream(prompts[0], GREEDY, 60, ())
    )


def test_sampled_answers_do_not_depend_on_the_batch(model, prompts):
    decoding = SamplingParams(do_sample=True, temperature=1.5, top_k=20, seed=5)
    together = run(Runner(model), prompts, decoding)
    for number, prompt in enumerate(prompts):
        own = SamplingParams(do_sample=True, temperature=1.5, top_k=20, seed=5 + number)
        assert run(Runner(model, enable_prefix_caching=False), [prompt], own) == [together[number]]
    assert run(Runner(model), [prompts[3]] * 4, decoding) != [together[3]] * 4


def test_many_prompts_are_computed_in_few_forwards(model, prompts):
    calls = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: calls.append(inputs[0].shape[:2])
    )
    try:
        run(Runner(model, max_batch=128), [prompts[number % 2] for number in range(90)])
    finally:
        handle.remove()
    assert [rows for rows, _ in calls] == [90]


def test_questions_about_one_new_image_compute_it_once(model, prompts):
    calls = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: calls.append(tuple(inputs[0].shape[:2]))
    )
    runner = Runner(model)
    runner.reader.prefixes.shortest = 4
    _, pixels = prompts[1]
    asked = [Prompt((1, *IMAGE, 5, 6, number), pixels) for number in range(8, 14)]
    try:
        run(runner, asked)
    finally:
        handle.remove()
    assert calls == [(1, 7), (5, 1)]


# ------------------------------------------------------------------ leaving and failing


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_closing_a_stream_frees_its_row(model, prompts, alone, steps):
    runner = Runner(model, max_batch=1)
    stream = runner.stream(prompts[0], GREEDY, 100_000, ())
    next(stream)
    stream.close()
    assert run(runner, prompts[:3]) == alone[:3]
    assert len(steps) < 10_000


def in_thread(call):
    """What came of a call in another thread: its result, or its exception."""
    made = []

    def target():
        try:
            made.append(call())
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, made


def test_an_interrupted_call_frees_its_rows(model, prompts, alone, monkeypatch):
    runner = Runner(model, max_batch=2)

    class Interrupted:
        def get(self):
            raise KeyboardInterrupt

        def put(self, item):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("owl2.engine.engine_core.SimpleQueue", Interrupted)
        thread, made = in_thread(
            lambda: runner.generate(prompts[:2], GREEDY, [100_000] * 2, ()),
        )
        thread.join(20)
    assert isinstance(made[0], KeyboardInterrupt)
    assert run(runner, prompts) == alone


def test_an_interrupted_step_ends_all_and_leaves_it_usable(model, prompts, alone, monkeypatch):
    """The main thread leads, another one waits; Ctrl-C comes in the middle of a step."""
    runner = Runner(model)
    step, other = FastDecoder.step, []

    def interrupted(self, tokens, positions):
        if not other:
            other.append(in_thread(lambda: run(runner, prompts[1:2])))
        if len(tokens) == 2:
            raise KeyboardInterrupt
        return step(self, tokens, positions)

    with monkeypatch.context() as patch:
        patch.setattr(FastDecoder, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.generate(prompts[:1], GREEDY, [100_000], ())
        [(thread, made)] = other
        thread.join(20)
    assert "interrupted" in str(made[0])
    assert run(runner, prompts) == alone


def test_the_main_thread_leads_and_leaves_the_rest_to_the_other(model, prompts, alone, monkeypatch):
    runner = Runner(model)
    step, leaders, other = FastDecoder.step, [], []

    def noted(self, tokens, positions):
        leaders.append((threading.current_thread() is threading.main_thread(), len(tokens)))
        if not other:
            long = [TOKENS + 20]
            other.append(in_thread(lambda: runner.generate(prompts[1:2], GREEDY, long, ())))
            time.sleep(0.2)
        return step(self, tokens, positions)

    monkeypatch.setattr(FastDecoder, "step", noted)
    assert run(runner, prompts[:1]) == alone[:1]
    [(thread, made)] = other
    thread.join(20)
    assert made[0][0][:TOKENS] == alone[1]
    assert leaders[0] == (True, 1)
    assert (True, 2) in leaders, "both together"
    assert leaders[-1] == (False, 1), "the longer one goes on without the main thread"


def test_a_stream_of_the_main_thread_is_made_as_it_is_asked_for(model, prompts, alone, steps):
    runner = Runner(model)
    stream = runner.stream(prompts[0], GREEDY, TOKENS, ())
    first = next(stream)
    made = len(steps)
    time.sleep(0.1)
    assert len(steps) == made <= 1
    assert run(runner, prompts[1:2]) == alone[1:2]  # beside it
    assert [first, *stream] == alone[0]


def test_an_error_reaches_only_whose_it_is(model, prompts, alone, monkeypatch):
    """Logits of one row go wrong in the middle of the answers."""
    runner = Runner(model)
    step = FastDecoder.step
    victim = prompts[2]

    def spoilt(self, tokens, positions):
        logits = step(self, tokens, positions)
        # Nobody else is at this position: prompts are of different lengths.
        return torch.where((positions == 3 + len(victim.ids))[:, None], float("nan"), logits)

    monkeypatch.setattr(FastDecoder, "step", spoilt)
    results = {}

    def one(name, prompt):
        try:
            results[name] = runner.generate([prompt], GREEDY, [TOKENS], ())[0]
        except InputError as error:
            results[name] = str(error)

    long = prompts[18]
    expected = hf_generate.generate(model, [long], GREEDY, [TOKENS], ())[0]
    threads = [
        threading.Thread(target=one, args=(name, prompt))
        for name, prompt in (("long", long), ("victim", victim))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results["long"] == expected
    assert "token 5 of the answer" in results["victim"]


@pytest.mark.parametrize("where", ["step", "prompt"])
def test_an_error_of_the_machine_reaches_all_and_leaves_it_usable(
    model, prompts, alone, monkeypatch, where
):
    runner = Runner(model)
    errors = []

    def one(number):
        try:
            runner.generate([prompts[number]], GREEDY, [2_000], ())
        except RuntimeError as error:
            errors.append(str(error))

    def fail(*_):
        raise RuntimeError("out of memory")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    with monkeypatch.context() as patch:
        if where == "step":
            patch.setattr(FastDecoder, "step", fail)
        else:
            patch.setattr(type(runner.reader), "read", fail)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert errors == ["out of memory"] * 4
    assert run(runner, prompts) == alone


def test_prompts_that_do_not_fit_are_refused_before_they_disturb(model, prompts):
    runner = Runner(model)
    pixels = prompts[1].pixel_values
    for prompt, message in (
        (Prompt((1, 41)), "hold 41"),
        (Prompt((1, *IMAGE, 2)), "0 images"),
        (Prompt((1, 2), pixels), "1 images"),
        (Prompt((1, *IMAGE, 2), pixels[..., :4]), "shape"),
        (Prompt(()), "one token"),
    ):
        for call in (
            lambda prompt=prompt: run(runner, [prompts[0], prompt]),
            lambda prompt=prompt: runner.stream(prompt, GREEDY, 3, ()),
        ):
            with pytest.raises(InputError, match=message):
                call()


# ------------------------------------------------------------------ threads


def test_eight_threads_at_once(shared_engine, conversations):
    engine = Engine(shared_engine.model, shared_engine.processor, enable_prefix_caching=True)
    engine.runner.reader.prefixes.shortest = 4
    options = {"max_new_tokens": TOKENS}
    drawn = {"max_new_tokens": TOKENS, "temperature": 2.0, "seed": 4}
    expected = [
        (
            shared_engine.chat(one, **options),
            shared_engine.chat(one, **drawn),
            shared_engine.score(one, ["red", "no"]),
        )
        for one in conversations
    ]
    wrong = []

    def work(number):
        for place in range(number, number + 5):
            place %= len(conversations)
            one, (greedy, sampled, scores) = conversations[place], expected[place]
            for stop in engine.stream(one, max_new_tokens=90):
                if stop and number % 2:
                    break  # leaves early
            results = (
                engine.chat(one, **options) == greedy,
                "".join(engine.stream(one, **options)) == greedy,
                engine.chat(one, **drawn) == sampled,
                engine.batch([one, one], **options) == [greedy] * 2,
                engine.score(one, ["red", "no"]) == pytest.approx(scores, abs=1e-5, rel=1e-6),
            )
            if not all(results):
                wrong.append((number, place, results))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_nobody_asks_no_thread_and_no_model_stay(prompts):
    runner = Runner(make_model(seed=1).eval())
    before = threading.active_count()
    run(runner, prompts[:2])
    assert threading.active_count() == before, "the main thread does it itself"
    in_thread(partial(run, runner, prompts[:2]))[0].join(20)
    assert threading.active_count() == before + 1
    gone = weakref.ref(runner.model)
    del runner
    wait_for(lambda: threading.active_count() == before)
    assert gone() is None


def test_the_process_ends_in_the_middle_of_an_answer():
    script = """
        from owl2.engine.sampling import SamplingParams
        from owl2.engine.engine_core import Prompt, Runner
        from tests.tiny import make_model
        runner = Runner(make_model().eval())
        stream = runner.stream(Prompt((1, 2, 3)), SamplingParams(), 1_000_000, ())
        next(stream)
        keep = [stream]
        keep.append(keep)
        print("bye")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr


# ------------------------------------------------------------------ choosing


def test_choosing_marks_rows_that_are_not_finite():
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 6)
    logits[1, 0] = float("nan")
    logits[2, 2] = float("inf")
    logits[3] = float("-inf")
    logits[4, 1] = float("-inf")
    assert sample(logits, [GREEDY] * 6, [None] * 6) == [1, None, None, None, 2, 1]
    only = SamplingParams(do_sample=True, top_k=1, seed=1)
    generator = only.generator(0, logits.device)
    assert sample(logits, [only] * 6, [generator] * 6) == [1, None, None, None, 2, 1]


def test_models_that_are_not_whole_are_left_to_generate(shared_engine, conversations, monkeypatch):
    monkeypatch.setattr(hf_generate, "is_whole", lambda model: False)
    engine = Engine(shared_engine.model, shared_engine.processor)
    assert engine.runner is None
    options = {"max_new_tokens": TOKENS}
    expected = shared_engine.batch(conversations, **options)
    assert engine.batch(conversations, **options) == expected
    assert "".join(engine.stream(conversations[2], **options)) == expected[2]
    assert engine.score(ask("what?", image(1)), ["red"]) == pytest.approx(
        shared_engine.score(ask("what?", image(1)), ["red"]), rel=1e-6
    )
    assert hf_generate.is_whole(shared_engine.model) is False
    monkeypatch.undo()
    assert hf_generate.is_whole(shared_engine.model)


def test_a_prompt_that_ends_with_its_image_is_computed_from_where_that_begins(model, prompts):
    prompt = Prompt((1, 5, *IMAGE), prompts[1].pixel_values)
    runner = Runner(model)
    runner.reader.prefixes.shortest = 1
    expected = hf_generate.generate(model, [prompt], GREEDY, [TOKENS], {7})
    assert [run(runner, [prompt]) for _ in range(2)] == [expected] * 2
