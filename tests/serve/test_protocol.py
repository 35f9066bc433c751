"""Fields of requests: accepted and rejected values, engine options, and limits."""

import json
import re
from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from owl2.engine.sampling_params import MAX_SEED, StructuredOutputsParams
from owl2.serve.config import MAX_N, ServerLimits
from owl2.serve.errors import ApiError, as_api_error
from owl2.serve.generation import token_limit
from owl2.serve.protocol import ChatCompletionRequest
from owl2.serve.request_limits import check_limits
from owl2.serve.sampling_fields import MAX_OPENAI_SEED

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


UNSUPPORTED = sorted(
    name
    for name, schema in ChatCompletionRequest.model_json_schema()["properties"].items()
    if schema.get("description") == "Not supported."
)


def request(**fields):
    fields = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields
    return ChatCompletionRequest.model_validate(json.loads(json.dumps(fields)))


def message(*parts):
    return [{"role": "user", "content": list(parts)}]


def check(fields, **limits):
    check_limits(ServerLimits(**limits), context=1000, **request(**fields).counts())


def test_omitted_fields_have_the_defaults_of_the_checkpoint():
    assert request().sampling_options() == {
        "n": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "repetition_penalty": None,
        "presence_penalty": None,
        "frequency_penalty": None,
        "logit_bias": None,
        "min_new_tokens": None,
        "seed": None,
        "stop": [],
        "stop_token_ids": None,
        "ignore_eos": None,
        "skip_special_tokens": None,
        "top_logprobs": None,
        "structured_outputs": None,
    }


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 1, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
        ({"temperature": 1, "top_p": 0}, {"temperature": 0.0, "top_p": None}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"min_p": 0.2}, {"min_p": 0.2}),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),
        ({"min_tokens": 3}, {"min_new_tokens": 3}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"frequency_penalty": -2}, {"frequency_penalty": -2.0}),
        ({"logit_bias": {"5": 1, "7": -100}}, {"logit_bias": {5: 1.0, 7: -100.0}}),
        ({"stop_token_ids": [3]}, {"stop_token_ids": [3]}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {"stop": []}),
        ({"n": 3}, {"n": 3}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": 7.0, "top_k": 5.0, "n": 2.0}, {"seed": 7, "top_k": 5, "n": 2}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"top_logprobs": 5}),
        ({"logprobs": False}, {"top_logprobs": None}),
    ],
)
def test_fields_become_engine_options(fields, options):
    actual = request(**fields).sampling_options()
    assert {name: actual[name] for name in options} == options


@pytest.mark.parametrize("seed", [0, -1, MAX_SEED + 1, MAX_OPENAI_SEED, -MAX_OPENAI_SEED - 1])
def test_seeds_of_all_answers_are_in_the_engines_range(seed):
    first = request(seed=seed, n=MAX_N).sampling_options()["seed"]
    assert 0 <= first <= MAX_SEED - (MAX_N - 1)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": FORMAT}, {"json": SCHEMA}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": json.dumps(SCHEMA)}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_regex": "[ab]", "response_format": {"type": "text"}}, {"regex": "[ab]"}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"json": {}}}, {"json": {}}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"json_object": True, "disable_any_whitespace": True},
        ),
    ],
)
def test_fields_of_structured_output(fields, expected):
    options = request(**fields).sampling_options()
    assert options["structured_outputs"] == StructuredOutputsParams(**expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": {"a": [1]}, "store": True, "metadata": {}, "service_tier": "auto"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": []},
        {"tools": None, "response_format": {"type": "text"}, "modalities": ["text"]},
        {"messages": message({"type": "text", "text": "a", "unknown": 1}, IMAGE)},
        {"messages": [{"role": "user", "content": "a", "name": "someone"}]},
        {"stream": True, "stream_options": {"include_usage": True}, "user": "me"},
        {"repetition_penalty": 1.0, "min_p": 0, "length_penalty": 1.0, "best_of": 1},
        {"top_logprobs": 0, "tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none", "parallel_tool_calls": True},
        {"messages": message({"type": "image_url", "image_url": "data:,"})},
        *(
            {
                "messages": message(
                    {"type": "image_url", "image_url": {"url": "a", "detail": detail}}
                )
            }
            for detail in (None, "auto", "original", "ultra")
        ),
        {"messages": [{"role": "assistant", "content": None}, {"role": "assistant"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
        {"chat_template_kwargs": {"interleave_images": True, "enable_thinking": False}},
        {"ignore_eos": False, "use_beam_search": False, "skip_special_tokens": True},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"guided_json": None, "bad_words": [], "tool_choice": "auto", "chat_template_kwargs": {}},
    ],
)
def test_fields_without_effect_are_accepted(fields):
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
        {"messages": [{"role": "system", "content": None}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}]},
        {"messages": [{"role": "tool", "tool_call_id": "x"}]},
        {"messages": [{"role": "critic", "content": "x"}]},
        {"messages": [{"role": "function", "name": "f"}]},
        {"messages": message({"image": "/etc/passwd"})},
        {"messages": message({"type": ["text"], "text": "a"})},
        {"messages": message(5)},
        {"max_tokens": "4"},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"messages": message()},
        {"messages": message({"type": "video_url"})},
        {"messages": message({"type": "image_url", "image_url": ""})},
        {"messages": message({"type": "image_url", "image_url": 5})},
        {"messages": message({"type": "image_url", "image_url": {"url": "a", "detail": 3}})},
        {"messages": message({"type": "image", "path": "/etc/passwd"})},
        {"messages": [{"role": "user", "content": "x"}] * 4097},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": -2},
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
        {"presence_penalty": 2.1},
        {"frequency_penalty": True},
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"-5": 1}},
        {"logit_bias": {"red": 1}},
        {"logit_bias": {"1" * 20: 1}},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": 5},
        {"chat_template_kwargs": {"interleave_images": "false"}},
        {"prompt_logprobs": 1},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"functions": [{}]},
        {"tool_choice": "required"},
        {"repetition_penalty": 0},
        {"min_p": 1.5},
        {"min_tokens": -1},
        {"guided_choice": []},
        {"guided_choice": "yes"},
        {"guided_choice": ["yes"], "guided_regex": "[a-z]"},
        {"guided_json": {}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"choice": ["yes"], "regex": "yes"}},
        {"structured_outputs": {"structural_tag": "{}"}},
        {"structured_outputs": {"json": 5}},
        {"structured_outputs": "yes"},
        {"bad_words": ["red"]},
        {"allowed_token_ids": [3]},
        {"truncate_prompt_tokens": 10},
        {"chat_template": "{{ x }}"},
        {"use_beam_search": True},
        {"add_generation_prompt": False},
        {"length_penalty": 0.8},
        {"best_of": True},
        {"modalities": ["audio"]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "grammar"}},
    ],
)
def test_invalid_and_unsupported_values_are_rejected(fields):
    with pytest.raises(ValidationError):
        request(**fields)


@pytest.mark.parametrize(
    ("fields", "limit", "value", "code", "param"),
    [
        ({"messages": message(IMAGE, IMAGE)}, "max_images", 1, "too_many_images", "messages"),
        (
            {"messages": [{"role": "user", "content": "x"}] * 3},
            "max_messages",
            2,
            "too_many_messages",
            "messages",
        ),
        ({"n": 3}, "max_n", 2, "too_many_answers", "n"),
    ],
)
def test_limits_reject_only_larger_requests(fields, limit, value, code, param):
    with pytest.raises(ApiError) as caught:
        check(fields, **{limit: value})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    check(fields, **{limit: value + 1})


def test_images_of_all_messages_are_counted():
    [turn] = message(IMAGE)
    fields = {"messages": [turn, {"role": "assistant", "content": "a"}, turn]}
    with pytest.raises(ApiError):
        check(fields, max_images=1)
    check(fields, max_images=2)


@pytest.mark.parametrize(
    ("requested", "allowed"),
    [(3, 3), (8, 8), (4000, 8), (2**31 - 1, 8), (10**400, 8), (-1, 8), (None, 8)],
)
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_limit_are_clipped(tiny_engine, field, requested, allowed):
    limits = ServerLimits(max_completion_tokens=8)
    options = token_limit(tiny_engine, limits, request(**{field: requested}).max_answer_tokens)
    assert options["max_new_tokens"] == allowed


def test_max_completion_tokens_replaces_max_tokens():
    assert request(max_tokens=3, max_completion_tokens=4).max_answer_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"tools": [{}]}, "tools"),
        ({"functions": [{}], "function_call": "auto"}, "functions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ],
)
def test_errors_name_the_field(fields, param):
    with pytest.raises(ValidationError) as caught:
        request(**fields)
    problems = [problem | {"loc": ("body", *problem["loc"])} for problem in caught.value.errors()]
    error = as_api_error(RequestValidationError(problems))
    assert (error.status, error.param, error.code) == (400, param, "invalid_value")


def documented_fields(heading):
    """The fields in the first column of the table of server-api.md whose header starts so."""
    text = (Path(__file__).parents[2] / "docs/reference/server-api.md").read_text(encoding="utf-8")
    rows = text.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [field for row in rows for field in re.findall(r"`(\w+)`", row.split(" | ")[0])]


def test_documentation_lists_every_field_once():
    rejected = documented_fields("fields that are not supported")
    assert sorted(rejected) == UNSUPPORTED
    accepted = ChatCompletionRequest.model_fields.keys() - set(rejected)
    assert sorted(documented_fields("field | values")) == sorted(accepted)


@pytest.mark.parametrize("field", UNSUPPORTED)
@pytest.mark.parametrize("value", [0.5, "x", ["x"], {"x": 1}])
def test_values_with_an_effect_are_rejected(field, value):
    request(**{field: None})
    with pytest.raises(ValidationError):
        request(**{field: value})
