"""Options of a checkpoint's `generation_config` and of calls: answers equal those of `generate`."""

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.engine.sampling_params import SamplingParams
from owl2.errors import ErrorCode
from tests.engine.conftest import ask, caching_engine, model_inputs
from tests.errors import raises_input_error

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length")  # of short prompts
TOKENS = 10
# For the answer [a, b, c, ...] of the model without options.
OPTIONS = {
    "repetition_penalty": lambda ids: 3.0,
    "encoder_repetition_penalty": lambda ids: 9.0,
    "no_repeat_ngram_size": lambda ids: 1,
    "encoder_no_repeat_ngram_size": lambda ids: 1,
    "bad_words_ids": lambda ids: [[ids[0]], ids[1:3]],
    "suppress_tokens": lambda ids: [ids[1]],
    "begin_suppress_tokens": lambda ids: [ids[0]],
    "sequence_bias": lambda ids: [[[ids[0], ids[1]], -30.0]],
    "min_new_tokens": lambda ids: 7,
    "min_length": lambda ids: 60,
    "exponential_decay_length_penalty": lambda ids: [0, 50.0],
    "forced_eos_token_id": lambda ids: 5,
    "eos_token_id": lambda ids: [ids[3], ids[4]],
}
SAMPLING = {
    "top_k": 5,
    "top_p": 0.4,
    "min_p": 0.3,
    "typical_p": 0.3,
    "top_h": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.05,
    "repetition_penalty": 2.0,
}


def generate(engine, messages, **options):
    """The ids of transformers' answer, up to its end token."""
    inputs = model_inputs(engine, messages)
    ids = engine.model.generate(**inputs, **options)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def text_of(engine, ids):
    ids = ids[:-1] if ids[-1] in engine.end_ids else ids
    return engine.processor.decode(ids, skip_special_tokens=True).strip()


def answer(engine, messages, **options):
    """The ids of the engine's answer."""
    [output] = engine.complete(messages, top_logprobs=0, **options).outputs()
    return [own.id for own in output.logprobs]


@pytest.fixture
def questions(shared_engine, conversations):
    """Several turns and images; the last question contains frequent tokens of the answers."""
    answers = shared_engine.batch(conversations[:8], max_new_tokens=5)
    return [*conversations[:4], ask(" ".join(answers).replace("\ufffd", ""))]


@pytest.fixture(params=OPTIONS)
def option(request, engine, questions):
    """A value in the generation_config of the engine's model that changes its answers."""
    name = request.param
    config = engine.model.generation_config
    config.update(max_new_tokens=TOKENS, eos_token_id=engine.end_ids)
    first = generate(engine, questions[1])
    if name in ("min_new_tokens", "min_length", "exponential_decay_length_penalty"):
        config.eos_token_id = [*engine.end_ids, first[3]]
    plain = [generate(engine, one) for one in questions]
    value = OPTIONS[name](first)
    setattr(config, name, value)
    expected = [generate(engine, one) for one in questions]
    assert expected != plain
    return name, value, expected


def test_an_option_of_a_checkpoint_or_a_call_has_the_effect_of_generate(engine, questions, option):
    name, value, expected = option
    engine = Engine(engine.model, engine.processor)
    assert [answer(engine, one) for one in questions] == expected
    texts = [text_of(engine, ids) for ids in expected]
    assert engine.batch(questions) == texts
    cached = caching_engine(engine)
    assert cached.batch(questions) == cached.batch(questions[::-1])[::-1] == texts
    assert cached.stats().prefix_cache_bytes
    core, engine.core = engine.core, None  # as for weights on several devices
    assert engine.batch(questions) == texts
    assert getattr(engine.model.generation_config, name) == value
    # An option of a call has the same effect on its answer only.
    engine.core = core
    if name == "eos_token_id":
        with pytest.raises(TypeError):
            engine.chat(questions[1], eos_token_id=value)
        return
    setattr(engine.model.generation_config, name, None)
    plain = [engine.chat(one) for one in questions]
    assert plain != texts
    assert engine.batch(questions, **{name: value}) == texts
    with engine.complete(questions[0], n=3, temperature=2.0) as running:
        next(running)
        assert engine.chat(questions[1], **{name: value}) == texts[1]
        assert engine.chat(questions[1]) == plain[1]


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_answers_equal_those_of_generate(engine, conversations, name):
    config = engine.model.generation_config
    config.update(max_new_tokens=TOKENS, eos_token_id=engine.end_ids)
    config.update(do_sample=True, temperature=1.5, top_k=0)
    setattr(config, name, SAMPLING[name])
    engine = Engine(engine.model, engine.processor)
    for seed, one in enumerate(conversations[:4]):
        torch.manual_seed(seed)
        expected = generate(engine, one)
        torch.manual_seed(seed)
        assert answer(engine, one) == expected
    engine.core = None
    torch.manual_seed(seed)
    assert engine.chat(one) == text_of(engine, expected)


def test_seeds_of_processed_answers(shared_engine, conversations):
    options = {"temperature": 2.0, "repetition_penalty": 1.5, "max_new_tokens": TOKENS}
    alone = [
        shared_engine.chat(one, seed=4 + i, **options) for i, one in enumerate(conversations[:3])
    ]
    assert shared_engine.batch(conversations[:3], seed=4, **options) == alone
    outputs = shared_engine.complete(conversations[0], n=3, seed=4, **options).outputs()
    assert outputs[0].text == alone[0]
    assert len({output.text for output in outputs}) > 1


def test_max_length_of_a_checkpoint(engine, conversations):
    config = engine.model.generation_config
    length = len(engine.encode(conversations[1]).ids)
    config.max_length = length + 4
    engine = Engine(engine.model, engine.processor)
    assert answer(engine, conversations[1]) == generate(engine, conversations[1])
    assert len(answer(engine, conversations[1])) == 4
    assert len(answer(engine, conversations[1], max_new_tokens=6)) == 6
    assert len(answer(engine, conversations[1], max_length=length + 5)) == 5
    config.max_length = length
    with raises_input_error(ErrorCode.TOO_LONG, f"max_length={length}", "1 too many"):
        engine.complete(conversations[1])


def test_stop_strings_of_a_checkpoint(engine, conversations):
    text = engine.chat(conversations[0], max_new_tokens=TOKENS)
    engine.model.generation_config.stop_strings = [text[3:5]]
    assert engine.chat(conversations[0]) == text[: text.index(text[3:5])].strip()


def test_remove_invalid_values(nan_engine, conversations):
    nan_engine.model.generation_config.remove_invalid_values = True
    nan_engine.model.generation_config.max_new_tokens = TOKENS
    assert answer(nan_engine, conversations[0]) == generate(nan_engine, conversations[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("max_time", 3.0),
        ("token_healing", True),
        ("dola_layers", "high"),
        ("watermarking_config", {"bias": 2.0}),
        ("force_words_ids", [[1]]),
    ],
)
def test_unsupported_options_are_rejected_when_the_engine_is_created(engine, name, value):
    setattr(engine.model.generation_config, name, value)
    with raises_input_error(ErrorCode.UNSUPPORTED, f"{name}={value!r}"):
        Engine(engine.model, engine.processor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", -1.0),
        ("suppress_tokens", "red"),
        ("bad_words_ids", [[10**6]]),
        ("bad_words_ids", []),
        ("sequence_bias", [[1]]),
        ("begin_suppress_tokens", 3.5),
        ("typical_p", 2.0),
        ("no_repeat_ngram_size", -1),
    ],
)
def test_invalid_options(engine, conversations, name, value):
    for method in (engine.chat, engine.complete, engine.stream):
        with raises_input_error(ErrorCode.INVALID_VALUE):
            method(conversations[0], **{name: value})
    setattr(engine.model.generation_config, name, value)
    with raises_input_error(ErrorCode.INVALID_VALUE, "generation_config"):
        Engine(engine.model, engine.processor)


def test_neutral_options_have_no_processors(shared_engine, conversations):
    neutral = {"repetition_penalty": 1, "min_new_tokens": 0, "do_sample": False}
    expected = shared_engine.chat(conversations[0], max_new_tokens=3)
    assert shared_engine.chat(conversations[0], max_new_tokens=3, **neutral) == expected
    assert shared_engine.sampling_params(repetition_penalty=1, min_length=0) == SamplingParams()
