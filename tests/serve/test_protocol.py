"""What a request may hold, and what it may ask for."""

import json

import pytest
from pydantic import ValidationError

from owl2.serve.config import ServerLimits, check
from owl2.serve.errors import ApiError
from owl2.serve.protocol import ENGINE_SEEDS, LARGEST_SEED, ChatRequest

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def request(**fields):
    fields = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields
    return ChatRequest.model_validate(json.loads(json.dumps(fields)))


def content(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_what_is_not_said_is_left_to_the_engine():
    plain = request()
    assert plain.answers == 1
    assert plain.options() == {
        "max_new_tokens": None,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "seed": None,
        "stop": [],
        "top_logprobs": None,
    }


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_new_tokens": 4}),
        ({"temperature": 1, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
        ({"temperature": 1, "top_p": 0}, {"temperature": 0.0, "top_p": None}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {"stop": []}),
        ({"seed": 7}, {"seed": 7}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"top_logprobs": 5}),
        ({"logprobs": False}, {"top_logprobs": None}),
    ],
)
def test_fields_as_the_engine_takes_them(fields, options):
    given = request(**fields).options()
    assert {name: given[name] for name in options} == options


@pytest.mark.parametrize("seed", [0, -1, ENGINE_SEEDS, LARGEST_SEED, -LARGEST_SEED - 1])
def test_every_seed_is_one_of_the_engines_with_room_for_all_answers(seed):
    taken = request(seed=seed, n=128).options()["seed"]
    assert 0 <= taken <= ENGINE_SEEDS - 1 - 127


@pytest.mark.parametrize(
    "fields",
    [
        {"unheard_of": {"a": [1]}, "store": True, "metadata": {}, "service_tier": "auto"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": []},
        {"tools": None, "response_format": {"type": "text"}, "modalities": ["text"]},
        {"messages": content({"type": "text", "text": "a", "unheard_of": 1}, IMAGE)},
        {"messages": [{"role": "user", "content": "a", "name": "someone"}]},
        {"stream": True, "stream_options": {"include_usage": True}, "user": "me"},
    ],
)
def test_what_changes_nothing_is_taken(fields):
    request(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": None},
        {"model": ""},
        {"messages": []},
        {"messages": "x"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": content()},
        {"messages": content({"type": "video_url"})},
        {"messages": content({"type": "image_url", "image_url": "data:,"})},
        {"messages": content({"type": "image", "path": "/etc/passwd"})},
        {"messages": [{"role": "user", "content": "x"}] * 4097},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": 10**400},
        {"temperature": "0"},
        {"temperature": 2.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"seed": 2**63},
        {"n": 0},
        {"n": 129},
        {"stop": ""},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"stop": 5},
        {"stream": "yes"},
        {"logprobs": 5},
        {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": 3},
        {"stream_options": {"include_usage": True}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": True},
        {"logit_bias": {"5": 1}},
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"modalities": ["audio"]},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_cannot_be_done_is_refused(fields):
    with pytest.raises(ValidationError):
        request(**fields)


@pytest.mark.parametrize(
    ("fields", "limits", "code", "param"),
    [
        ({"messages": content(IMAGE, IMAGE)}, {"images": 1}, "too_many_images", "messages"),
        (
            {"messages": [{"role": "user", "content": "x"}] * 3},
            {"messages": 2},
            "too_many_messages",
            "messages",
        ),
        ({"n": 3}, {"answers": 2}, "too_many_answers", "n"),
        ({"max_tokens": 9}, {"answer_tokens": 8}, "too_many_tokens", "max_tokens"),
        (
            {"max_completion_tokens": 9},
            {"answer_tokens": 8},
            "too_many_tokens",
            "max_completion_tokens",
        ),
    ],
)
def test_every_limit_has_its_code_and_is_not_too_strict(fields, limits, code, param):
    with pytest.raises(ApiError) as caught:
        check(request(**fields), ServerLimits(**limits))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    [name] = limits
    check(request(**fields), ServerLimits(**{name: limits[name] + 1}))


def test_images_of_all_turns_count_together():
    turn = content(IMAGE)[0]
    many = request(messages=[turn, {"role": "assistant", "content": "a"}, turn])
    with pytest.raises(ApiError):
        check(many, ServerLimits(max_images=1))
    check(many, ServerLimits(max_images=2))
