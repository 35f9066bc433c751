"""`/v1/completions`, compared with the engine's answers and scores."""

import asyncio
from dataclasses import replace

import openai
import pytest

from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.serve import generation

PROMPT = "USER: what is this? ASSISTANT:"


@pytest.fixture
def complete(client):
    def complete(prompt=PROMPT, **options):
        options = {"max_tokens": 8, "temperature": 0} | options
        return client.completions.create(model="tiny", prompt=prompt, **options)

    return complete


def ids_of(engine, text=PROMPT):
    return engine.processor(text=text)["input_ids"][0]


def engine_text(engine, ids, **options):
    """The answer with its leading space, which `Engine.chat` removes."""
    image = engine.processor.image_token_id, engine.processor.num_image_tokens
    prompt = replace(PreparedPrompt.from_ids(ids, None, *image), is_continued=True)
    with engine.complete(prompt, temperature=0.0, **options) as completion:
        return completion.outputs()[0].text


def test_prompts_are_texts_or_ids_and_answers_are_those_of_the_engine(complete, tiny_engine):
    ids = ids_of(tiny_engine)
    expected = engine_text(tiny_engine, ids, max_new_tokens=8)
    reply = complete()
    assert (reply.object, reply.id[:5]) == ("text_completion", "cmpl-")
    assert reply.choices[0].text == expected != ""
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 8)
    assert complete(ids).choices[0].text == expected
    assert complete([ids]).choices[0].text == expected
    whole = tiny_engine.processor.decode([*ids, *ids_after(tiny_engine, ids)], True)
    assert whole == PROMPT + expected


def ids_after(engine, ids):
    image = engine.processor.image_token_id, engine.processor.num_image_tokens
    prompt = PreparedPrompt.from_ids(ids, None, *image)
    with engine.complete(prompt, temperature=0.0, max_new_tokens=8, top_logprobs=0) as completion:
        return [token.id for token in completion.outputs()[0].logprobs]


def test_several_prompts_with_several_answers(complete):
    prompts = [PROMPT, "yes", "blue green"]
    options = {"n": 2, "temperature": 1.5, "seed": 3}
    together = complete(prompts, **options)
    assert [choice.index for choice in together.choices] == list(range(6))
    texts = [choice.text for choice in together.choices]
    alone = [choice.text for prompt in prompts for choice in complete(prompt, **options).choices]
    assert texts == alone
    streamed = [""] * 6
    for chunk in complete(prompts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_default_number_of_tokens_is_16(complete):
    assert complete(max_tokens=openai.omit).usage.completion_tokens == 16


@pytest.mark.parametrize("tokens", [4096, 2**31 - 1, -1])
def test_large_numbers_of_tokens_are_clipped_to_the_context(complete, tiny_engine, tokens):
    reply = complete(max_tokens=tokens, extra_body={"ignore_eos": True})
    assert reply.usage.total_tokens == tiny_engine.context_length


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "yes no"]])
def test_echo_with_logprobs(complete, tiny_engine, prompt):
    """As lm-evaluation-harness scores choices: the log-probabilities of the prompt's tokens."""
    reply = complete(prompt, echo=True, logprobs=3, max_tokens=2)
    texts = [prompt] if isinstance(prompt, str) else prompt
    for choice, text in zip(reply.choices, texts, strict=True):
        ids = ids_of(tiny_engine, text)
        answer = complete(ids, logprobs=3, max_tokens=2).choices[0]
        logprobs = choice.logprobs
        assert choice.text == text + answer.text
        assert logprobs.tokens[len(ids) :] == answer.logprobs.tokens
        assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
        image = tiny_engine.processor.image_token_id, tiny_engine.processor.num_image_tokens
        for end in (1, len(ids) // 2, len(ids) - 1):  # the engine's scores after each prefix
            prefix = PreparedPrompt.from_ids(ids[:end], None, *image)
            scores = tiny_engine.run_prefilled(
                prefix, lambda prefill: prefill.logits[0].float().log_softmax(-1)
            )
            assert logprobs.token_logprobs[end] == pytest.approx(scores[ids[end]].item(), abs=1e-4)
            best = scores.topk(3).values.tolist()
            found = sorted(logprobs.top_logprobs[end].values(), reverse=True)
            assert found[:3] == pytest.approx(best, abs=1e-4)
        places = [*zip(logprobs.tokens, logprobs.text_offset, strict=True)][2:]
        assert places == sorted(places, key=lambda place: place[1])
        for token, offset in places:
            part = choice.text[offset : offset + len(token)]
            assert part == token or "\\x" in token  # an incomplete character
    first, *_ = complete(text, echo=True, logprobs=3, stream=True)
    assert first.choices[0].text.startswith(text)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_prompts_are_encoded_in_threads(complete, monkeypatch, stream):
    """In the event loop, those of long prompts would delay all clients."""
    is_in_loop = []
    encode = generation.encode_large_json

    def record(data):
        try:
            asyncio.get_running_loop()
            is_in_loop.append(True)
        except RuntimeError:
            is_in_loop.append(False)
        return encode(data)

    monkeypatch.setattr(generation, "encode_large_json", record)
    list(complete(["yes", PROMPT], echo=True, logprobs=3, max_tokens=2, stream=stream))
    assert is_in_loop == ([False, False] if stream else [False])


@pytest.mark.parametrize(
    "data",
    [{}, {"a": [], "ä\ud83d": None}, {"a": [{"b": list(range(100))}] * 3, "c": [{}] * 65}],
    ids=["empty", "surrogate", "long"],
)
def test_large_json_equals_json(data):
    assert generation.encode_large_json(data) == generation.encode_json(data)


def test_prompt_is_scored_in_parts(complete, monkeypatch):
    expected = complete(echo=True, logprobs=0, max_tokens=0).choices[0].logprobs.token_logprobs
    monkeypatch.setattr("owl2.engine.scoring._SCORED_TOGETHER", 3)
    found = complete(echo=True, logprobs=0, max_tokens=0).choices[0].logprobs.token_logprobs
    assert found[1:] == pytest.approx(expected[1:], abs=1e-4)
    assert len(found) > 6


def test_no_new_tokens(complete, tiny_engine):
    reply = complete(echo=True, max_tokens=0)
    assert reply.choices[0].text == PROMPT
    assert reply.usage.completion_tokens == 0
    assert reply.usage.total_tokens == len(ids_of(tiny_engine))


def test_logprobs_of_an_answer_with_usage_in_a_stream(complete):
    options = {"logprobs": 1, "stop": ["zzz"], "user": "ada"}
    [choice] = complete(**options).choices
    *chunks, last = complete(stream=True, stream_options={"include_usage": True}, **options)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert "".join(choice.logprobs.tokens) == choice.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for part in parts for value in getattr(part, name)]
        assert streamed == getattr(choice.logprobs, name)
    assert last.usage == complete(**options).usage
    assert chunks[-1].choices[0].finish_reason == "length"


def test_ids_in_place_of_the_texts_of_tokens(complete):
    reply = complete(logprobs=1, extra_body={"return_tokens_as_token_ids": True})
    scores = reply.choices[0].logprobs
    assert all(token[:9] == "token_id:" and token[9:].isdecimal() for token in scores.tokens)
    assert scores.tokens[0] in scores.top_logprobs[0]
    assert scores.text_offset == complete(logprobs=1).choices[0].logprobs.text_offset


def test_structured_output(complete):
    pytest.importorskip("llguidance")
    options = {"extra_body": {"guided_choice": ["blue", "green"]}}
    assert complete(**options).choices[0].text in ("blue", "green")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, 10**6]}, None),
        ({"prompt": "an <|image|>"}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 99}, "logprobs"),
        ({"prompt": ["a"] * 5, "n": 2}, "n"),
        ({"prompt": "what is " * 200}, None),
        ({"best_of": 3}, "best_of"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_requests(complete, changes, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(**changes, stream=stream)
    assert param is None or caught.value.param.startswith(param)
