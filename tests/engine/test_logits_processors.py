"""OpenAI's penalties and biases, and the tokens that end an answer or are not part of its text."""

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from tests.engine.conftest import model_inputs
from tests.errors import raises_input_error

TOKENS = 10


def answer_ids(engine, messages, **options):
    options = {"max_new_tokens": TOKENS, "top_logprobs": 0} | options
    [output] = engine.complete(messages, **options).outputs()
    return [own.id for own in output.logprobs]


def expected_ids(engine, messages, presence, frequency, repetition=1.0):
    """Greedy decoding without a cache; the penalties are those of OpenAI's documentation."""
    inputs = model_inputs(engine, messages)
    prompt = inputs.pop("input_ids")[0]
    pixels = {key: value for key, value in inputs.items() if key == "pixel_values"}
    ids = prompt.tolist()
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([ids]), **pixels).logits[0, -1]
        logits = logits[: engine.model.config.vocab_size].float()
        for token in set(ids) - {engine.processor.image_token_id}:
            logits[token] = logits[token] * (repetition if logits[token] < 0 else 1 / repetition)
        for token in set(ids[len(prompt) :]):
            logits[token] -= presence + frequency * ids[len(prompt) :].count(token)
        ids.append(int(logits.argmax()))
        if ids[-1] in engine.end_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("presence", "frequency", "repetition"),
    [(2.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.5, 0.25, 1.0), (-2.0, 0.0, 1.0), (1.0, 1.0, 1.3)],
)
def test_penalties_are_those_of_the_formula(
    shared_engine, conversations, presence, frequency, repetition
):
    options = {"presence_penalty": presence, "frequency_penalty": frequency}
    for messages in conversations[:4]:
        found = answer_ids(shared_engine, messages, **options, repetition_penalty=repetition)
        assert found == expected_ids(shared_engine, messages, presence, frequency, repetition)


def test_penalties_change_answers_in_a_batch_and_leave_others(shared_engine, conversations):
    plain = [answer_ids(shared_engine, one) for one in conversations[:4]]
    changed = [answer_ids(shared_engine, one, frequency_penalty=2) for one in conversations[:4]]
    assert plain != changed
    assert max(map(changed[0].count, changed[0])) <= max(map(plain[0].count, plain[0]))
    assert [answer_ids(shared_engine, one) for one in conversations[:4]] == plain


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_logit_bias(shared_engine, conversations, sampling):
    first = answer_ids(shared_engine, conversations[0])[0]
    forced = answer_ids(shared_engine, conversations[0], logit_bias={50: 100.0}, **sampling)
    assert forced == [50] * TOKENS
    excluded = answer_ids(shared_engine, conversations[0], logit_bias={first: -100}, **sampling)
    assert first not in excluded


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {10**6: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"red": 1.0}},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"presence_penalty": float("nan")},
    ],
)
def test_invalid_values(shared_engine, conversations, options):
    with raises_input_error(ErrorCode.INVALID_VALUE, *options):
        shared_engine.chat(conversations[0], **options)


def test_stop_token_ids_end_the_answer(shared_engine, conversations):
    ids = answer_ids(shared_engine, conversations[0])
    position = next(i for i in range(2, TOKENS) if ids[i] not in ids[:i])
    options = {"max_new_tokens": TOKENS, "stop_token_ids": [ids[position], 10**6]}
    [output] = shared_engine.complete(conversations[0], **options).outputs()
    assert (output.finish_reason, output.num_tokens) == ("stop", position + 1)
    assert output.text == shared_engine.chat(conversations[0], max_new_tokens=position)
    # As in vLLM, no stop token occurs before the minimum.
    kept = answer_ids(
        shared_engine, conversations[0], stop_token_ids=[ids[position]], min_new_tokens=TOKENS
    )
    assert ids[position] not in kept[:TOKENS]
    assert len(kept) == TOKENS


def test_ignore_eos(engine, conversations):
    ids = answer_ids(engine, conversations[0])
    engine.model.generation_config.eos_token_id = ids[3]
    engine = Engine(engine.model, engine.processor)
    end = ids.index(ids[3])
    assert answer_ids(engine, conversations[0]) == ids[: end + 1]
    assert answer_ids(engine, conversations[0], ignore_eos=True) == ids
    assert answer_ids(engine, conversations[0], ignore_eos=True, stop_token_ids=[ids[0]]) == ids[:1]


def test_special_tokens_in_the_text(shared_engine, conversations):
    end = shared_engine.processor.tokenizer.eos_token_id
    options = {"logit_bias": {end: 100.0}, "max_new_tokens": 2, "ignore_eos": True}
    assert shared_engine.chat(conversations[0], **options) == ""
    options["skip_special_tokens"] = False
    assert shared_engine.chat(conversations[0], **options) == "</s></s>"
    [output] = shared_engine.complete(conversations[0], top_logprobs=0, **options).outputs()
    assert "".join(own.text for own in output.logprobs) == output.text
