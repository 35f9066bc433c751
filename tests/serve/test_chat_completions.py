"""Responses to OpenAI's client, compared with the engine's answers."""

import asyncio
import json

import httpx
import openai
import pytest
from PIL import Image

from tests.serve.images import data_uri, encode

QUESTION = "what is this?"


def color_uri(color="red", kind="PNG"):
    return data_uri(encode(Image.new("RGB", (12, 8), color), kind))


def user(*parts):
    """A user message; parts that are data URIs are images."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


CONVERSATIONS = {
    "text": [{"role": "user", "content": QUESTION}],
    "image": user(color_uri(), QUESTION),
    "image alone": user(color_uri()),
    "images": user(color_uri(), "or", color_uri("blue", "JPEG"), QUESTION),
    "turns": [
        *user(color_uri("green"), QUESTION),
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "yes or no"},
    ],
}


@pytest.fixture
def ask(client):
    def ask(messages=CONVERSATIONS["text"], **options):
        options = {"max_tokens": 12, "temperature": 0} | options
        return client.chat.completions.create(model="tiny", messages=messages, **options)

    return ask


def engine_outputs(tiny_engine, messages, n=1, **options):
    options = {"max_new_tokens": 12, "temperature": 0.0} | options
    with tiny_engine.complete(messages, n=n, **options) as completion:
        return completion.outputs()


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_answer_equals_the_engines(ask, tiny_engine, messages):
    reply = ask(messages)
    [answer] = engine_outputs(tiny_engine, messages)
    [choice] = reply.choices
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    assert reply.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content == answer.text != ""
    assert choice.finish_reason == answer.finish_reason
    assert choice.logprobs is None
    with tiny_engine.complete(messages) as completion:
        assert reply.usage.prompt_tokens == completion.num_prompt_tokens
    assert reply.usage.completion_tokens == answer.num_tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + answer.num_tokens


def test_images_precede_the_text(ask, tiny_engine):
    first, last = user(color_uri(), QUESTION), user(QUESTION, color_uri())
    reply, expected = ask(last), ask(first)
    assert reply.choices[0].message == expected.choices[0].message
    keep = {"chat_template_kwargs": {"interleave_images": True, "messages": [], "self": 1}}
    [inside] = engine_outputs(tiny_engine, [last[0] | {"interleave_images": True}])
    assert inside.text != expected.choices[0].message.content
    assert ask(last, extra_body=keep).choices[0].message.content == inside.text
    placed = user(f"{QUESTION}<|image|>", color_uri())
    assert ask(placed).choices[0].message.content == inside.text


EMPTY = {"role": "assistant", "content": ""}
CALLED = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "equal"),
    [
        ([*user("yes"), *user("or no")], user("yes\nor no")),
        ([*user("yes"), EMPTY, *user("or no")], user("yes\nor no")),
        ([*user("yes"), {"role": "assistant", "content": None}], user("yes")),
        ([*user("yes"), {"role": "assistant"}, *user("or no")], user("yes\nor no")),
        ([*user("yes"), {"role": "system", "content": "or no"}], user("yes\nor no")),
        ([{"role": "system", "content": ""}, *user("yes")], user("yes")),
        ([*user(QUESTION), *user(color_uri())], user(color_uri(), QUESTION)),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}]}, *user("b")],
            [{"role": "assistant", "content": "a"}, *user("b")],
        ),
        ([{"role": "user", "content": ["yes", {"text": "or no"}]}], user("yes", "or no")),
        ([{"role": "user", "content": [{"type": "input_text", "text": "yes"}]}], user("yes")),
        ([{"role": "user", "content": [{"image_url": color_uri()}]}], user(color_uri())),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": color_uri()}]}],
            user(color_uri()),
        ),
        (
            [*user("yes"), CALLED, {"role": "function", "name": "f", "content": "or no"}],
            [*user("yes"), {"role": "assistant", "content": "{}"}, *user("or no")],
        ),
    ],
)
def test_messages_in_any_order(ask, messages, equal):
    reply, expected = ask(messages), ask(equal)
    assert reply.choices[0].message == expected.choices[0].message
    assert reply.usage == expected.usage


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"logit_bias": {"50": 100}},
        {"extra_body": {"stop_token_ids": list(range(200))}},
        {"extra_body": {"repetition_penalty": 3}},
        {
            "extra_body": {"skip_special_tokens": False, "ignore_eos": True},
            "logit_bias": {"2": 100},
        },
    ],
    ids=str,
)
def test_fields_change_the_answer(ask, options):
    assert ask(**options).choices[0].message != ask().choices[0].message
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True, **options)]
    assert "".join(streamed) == ask(**options).choices[0].message.content


def test_tools_without_a_call(ask):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert ask(tools=tools, tool_choice="none").choices[0].message == ask().choices[0].message
    for choice in ("auto", openai.omit):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(tools=tools, tool_choice=choice)
        assert caught.value.param == "tools"


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "paint"}}, "required"]
)
def test_call_of_the_chosen_function(ask, choice):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "paint", "parameters": schema}}
    options = {"tools": [tool], "tool_choice": choice, "max_tokens": 60}
    message = ask(**options).choices[0].message
    [call] = message.tool_calls
    assert (message.content, call.type, call.function.name) == (None, "function", "paint")
    assert json.loads(call.function.arguments)["color"] in ("red", "blue")
    deltas = [chunk.choices[0].delta for chunk in ask(stream=True, **options)]
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert (calls[0].function.name, calls[0].id[:5]) == ("paint", "call_")
    assert "".join(one.function.arguments for one in calls) == call.function.arguments
    assert not any(delta.content for delta in deltas)


def test_call_in_the_history(ask):
    """As instructor sends it, after an answer that is not valid."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "tool_call_id": "c", "content": "not valid"}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = {"role": "assistant", "content": '{"a": 1}'}
    answers = [
        ask([*user("what?"), *history]).choices[0].message.content
        for history in ([called, result], [text, *user("not valid")])
    ]
    assert answers[0] == answers[1]


def test_image_urls_as_strings_and_details(ask):
    uri, content = color_uri(), ask(user(color_uri(), QUESTION)).choices[0].message.content
    header, _, data = uri.partition(",")
    url_safe = f"{header},{data.replace('+', '-').replace('/', '_').rstrip('=')}"
    lines = f"{header},\r\n" + "\r\n".join(data[i : i + 60] for i in range(0, len(data), 60))
    for image in (
        uri,
        url_safe,
        lines,
        {"url": uri, "detail": None},
        {"url": uri, "detail": "original"},
    ):
        parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
        reply = ask([{"role": "user", "content": parts}])
        assert reply.choices[0].message.content == content


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_streamed_and_complete_answers_are_equal(ask, messages):
    complete = ask(messages)
    chunks = list(ask(messages, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == complete.choices[0].message.content
    assert sum(map(bool, deltas)) > 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == complete.choices[0].finish_reason
    assert not any(reasons[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_helper_of_openais_client(client, ask):
    # The helper rejects answers with the finish reason "length", so this one ends by a stop string.
    options = {"max_tokens": 12, "temperature": 0, "logprobs": True}
    options["stop"] = ask().choices[0].message.content[6:9]
    complete = ask(**options)
    request = {"model": "tiny", "messages": CONVERSATIONS["text"]}
    with client.chat.completions.stream(**request, **options) as stream:
        events = [event.type for event in stream]
        accumulated = stream.get_final_completion()
    assert "content.delta" in events
    assert accumulated.choices[0].message.content == complete.choices[0].message.content
    assert accumulated.choices[0].finish_reason == complete.choices[0].finish_reason == "stop"
    tokens = accumulated.choices[0].logprobs.content
    assert [token.token for token in tokens] == [
        token.token for token in complete.choices[0].logprobs.content
    ]


def test_last_chunk_has_usage(ask):
    *chunks, last = ask(stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == ask().usage
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)


def test_stream_consists_of_events_and_ends_with_done(server_url):
    body = {"model": "tiny", "messages": CONVERSATIONS["text"], "max_tokens": 3, "stream": True}
    reply = httpx.post(f"{server_url}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_log_probabilities(ask, tiny_engine):
    reply = ask(logprobs=True, top_logprobs=3)
    [answer] = engine_outputs(tiny_engine, CONVERSATIONS["text"], top_logprobs=3)
    got = reply.choices[0].logprobs.content
    expected_tokens = [own for own in answer.logprobs if own.bytes]
    assert len(got) == len(expected_tokens) > 3
    for actual, expected in zip(got, expected_tokens, strict=True):
        assert (actual.token, actual.bytes) == (expected.text, expected.bytes or None)
        assert actual.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [top.token for top in actual.top_logprobs] == [top.text for top in expected.top]
        assert len(actual.top_logprobs) == 3
    chunks = list(ask(logprobs=True, top_logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [token for part in parts if part is not None for token in part.content]
    assert [token.token for token in streamed] == [token.token for token in got]
    for chunk in chunks:
        [choice] = chunk.choices
        tokens = choice.logprobs.content if choice.logprobs else []
        assert "".join(token.token for token in tokens) == (choice.delta.content or "")
    assert ask(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_several_answers(ask, tiny_engine):
    options = {"n": 3, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    reply = ask(**options)
    answers = engine_outputs(tiny_engine, CONVERSATIONS["text"], **options)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert texts == [answer.text for answer in answers]
    assert len(set(texts)) > 1
    assert reply.usage.completion_tokens == sum(answer.num_tokens for answer in answers)
    streamed = ["", "", ""]
    for chunk in ask(stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_not_part_of_the_answer(ask, stream):
    text = ask().choices[0].message.content
    stop = text[3:6]
    reply = ask(stop=[stop, "never generated"], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in reply]
        content = "".join(choice.delta.content or "" for choice in chunks)
        reason = chunks[-1].finish_reason
    else:
        content, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert content == text[: text.index(stop)]
    assert reason == "stop"


def test_equal_seeds_give_equal_answers(ask):
    texts = [ask(temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_max_tokens(ask):
    reply = ask(max_tokens=2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2
    assert ask(max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("tokens", [4096, 8192, 2**31 - 1, -1])
def test_large_numbers_of_tokens_are_clipped_to_the_context(ask, tiny_engine, tokens):
    reply = ask(max_tokens=tokens)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == tiny_engine.context_length


def test_models(client):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "owl2")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve("org/other")


@pytest.mark.parametrize(
    ("changes", "error", "value"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other'"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": user("   ")}, openai.BadRequestError, "empty"),
        (
            {"messages": user("what is " * 200)},
            openai.BadRequestError,
            "maximum context length is 128",
        ),
        ({"messages": user("data:image/png;base64,AAAA", "?")}, openai.BadRequestError, "image"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"n": 1000}, openai.BadRequestError, "n"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_raise_the_classes_of_openais_client(client, changes, error, value, stream):
    request = {
        "model": "tiny",
        "messages": CONVERSATIONS["text"],
        "max_tokens": 3,
        "stream": stream,
    }
    with pytest.raises(error, match=value) as caught:
        client.chat.completions.create(**request | changes)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body["message"]


def test_long_prompt_has_openais_code(ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(user("what is " * 200))
    assert caught.value.code == "context_length_exceeded"


async def _together(url, requests):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        return await asyncio.gather(
            *(client.chat.completions.create(**request) for request in requests)
        )


def test_concurrent_requests_do_not_change_answers(server_url, ask):
    # Tiny temperatures do not affect other requests either.
    requests = [
        {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": temperature}
        for temperature in (0, 1e-300, 0, 1e-44)
        for messages in CONVERSATIONS.values()
    ]
    replies = asyncio.run(_together(server_url, requests))
    alone = [ask(messages).choices[0].message.content for messages in CONVERSATIONS.values()]
    assert [reply.choices[0].message.content for reply in replies] == alone * 4
