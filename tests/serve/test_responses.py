"""`/v1/responses`, compared with chat completions and with OpenAI's types."""

import json
from typing import get_args

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from owl2.errors import ErrorCode, InputError
from owl2.serve.app import build_app
from tests.serve.running import FakeEngine, run_app, wait_until
from tests.serve.test_chat_completions import QUESTION, color_uri, user

EVENTS = TypeAdapter(ResponseStreamEvent)
PAINT = {
    "type": "function",
    "name": "paint",
    "parameters": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def respond(client):
    def respond(content=QUESTION, **options):
        options = {"max_output_tokens": 12, "temperature": 0} | options
        return client.responses.create(model="tiny", input=content, **options)

    return respond


@pytest.fixture
def chat_text(client):
    def chat_text(messages, **options):
        options = {"max_tokens": 12, "temperature": 0} | options
        reply = client.chat.completions.create(model="tiny", messages=messages, **options)
        return reply.choices[0].message.content

    return chat_text


def input_parts(*parts):
    return [
        {"type": "input_image", "image_url": part, "detail": "auto"}
        if part.startswith("data:")
        else {"type": "input_text", "text": part}
        for part in parts
    ]


SYSTEM = {"role": "system", "content": "yes"}
TURN = [{"role": "user", "content": "yes or no"}]
ANSWER = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "no", "annotations": [], "logprobs": []}],
}
INPUTS = {
    "text": (QUESTION, {}, user(QUESTION)),
    "message": ([{"role": "user", "content": QUESTION}], {}, user(QUESTION)),
    "image": (
        [{"type": "message", "role": "user", "content": input_parts(color_uri(), QUESTION)}],
        {},
        user(color_uri(), QUESTION),
    ),
    "instructions": (QUESTION, {"instructions": "yes"}, [SYSTEM, *user(QUESTION)]),
    "developer": ([SYSTEM | {"role": "developer"}, *TURN], {}, [SYSTEM, *TURN]),
    "turns": ([*TURN, ANSWER, *TURN], {}, [*TURN, {"role": "assistant", "content": "no"}, *TURN]),
    "refusal": (
        [*TURN, ANSWER | {"content": [{"type": "refusal", "refusal": "no"}]}, *TURN],
        {},
        [*TURN, {"role": "assistant", "content": "no"}, *TURN],
    ),
    "seed": (QUESTION, {"temperature": 1.5, "extra_body": {"seed": 3, "top_k": 9}}, user(QUESTION)),
}


@pytest.mark.parametrize(("text", "options", "messages"), INPUTS.values(), ids=INPUTS)
def test_answer_is_that_of_the_chat_route(respond, chat_text, text, options, messages):
    shared = {key: value for key, value in options.items() if key != "instructions"}
    assert respond(text, **options).output_text == chat_text(messages, **shared) != ""


def test_response_follows_openais_schema(server_url):
    fields = {"metadata": {"a": "b"}, "store": False, "user": "u", "instructions": "yes"}
    fields |= {"parallel_tool_calls": False, "truncation": "disabled", "reasoning": {}}
    body = {"model": "tiny", "input": QUESTION, "max_output_tokens": 3, **fields}
    data = httpx.post(f"{server_url}/v1/responses", json=body).json()
    reply = Response.model_validate(data)
    strict = TypeAdapter(Response).validate_json(json.dumps(data), strict=True)
    assert reply.model_dump() == strict.model_dump()
    assert data.keys() - {"store", "user"} <= Response.model_fields.keys()
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (reply.metadata, reply.instructions, data["store"]) == ({"a": "b"}, "yes", False)
    usage = reply.usage
    assert usage.output_tokens == 3
    assert usage.total_tokens == usage.input_tokens + 3
    assert (reply.previous_response_id, reply.error, reply.tools) == (None, None, [])
    [message] = reply.output
    assert (message.role, message.status, message.id[:4]) == ("assistant", "incomplete", "msg_")


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("responses", {"input": "x", "user": "\ud83d", "stream": False}, 200),
        ("responses", {"input": "x", "user": "\ud83d", "stream": True}, 200),
        ("completions", {"prompt": "\ud83d"}, 400),
        ("completions", {"prompt": ["a", "\ud83d"]}, 400),
    ],
)
def test_lone_surrogates(server_url, path, fields, status):
    body = json.dumps({"model": "tiny"} | fields)  # httpx would not encode a lone surrogate
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{server_url}/v1/{path}", content=body, headers=headers)
    assert reply.status_code == status
    assert "\\ud83d" in reply.text  # escaped, in the response or in the error
    assert "response.failed" not in reply.text


@pytest.mark.parametrize("options", [{}, {"top_logprobs": 2}], ids=["text", "logprobs"])
def test_events_follow_openais_schema(server_url, respond, options):
    stop = respond(**options).output_text[4:7]
    body = {"model": "tiny", "input": QUESTION, "max_output_tokens": 12, "temperature": 0}
    body |= {"stream": True, "stop": stop, **options}
    reply = httpx.post(f"{server_url}/v1/responses", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    datas = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [d["type"] for d in datas]
    events = [EVENTS.validate_json(json.dumps(data), strict=True) for data in datas]
    assert {type(event) for event in events} <= set(get_args(get_args(ResponseStreamEvent)[0]))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event, data in zip(events, datas, strict=True):
        assert data.keys() == event.model_dump(exclude_unset=True).keys()
    kinds = [event.type.removeprefix("response.") for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[:4] == begin
    assert kinds[-4:] == end
    assert set(kinds[4:-4]) == {"output_text.delta"}
    text = "".join(event.delta for event in events[4:-4])
    final = events[-1].response
    assert text == events[-4].text == events[-3].part.text == final.output_text
    assert final.status == "completed"
    assert final.completed_at >= final.created_at
    assert final.usage.output_tokens > 0
    assert len({events[2].item.id, events[4].item_id, final.output[0].id}) == 1


def test_logprobs(respond, client):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    got = respond(**options).output[0].content[0].logprobs
    chat = client.chat.completions.create(
        model="tiny",
        messages=user(QUESTION),
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    expected = chat.choices[0].logprobs.content
    assert [token.token for token in got] == [token.token for token in expected]
    assert got[0].logprob == pytest.approx(expected[0].logprob, abs=1e-5)
    assert len(got[0].top_logprobs) == 2
    streamed = respond(stream=True, **options)
    tokens = [own for event in streamed if event.type.endswith("delta") for own in event.logprobs]
    assert [token.token for token in tokens] == [token.token for token in got]
    assert respond().output[0].content[0].logprobs == []


def test_text_format_is_the_response_format(respond, chat_text):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    named = {"name": "x", "schema": schema, "strict": True}
    options = {"max_output_tokens": 60, "text": {"format": {"type": "json_schema", **named}}}
    reply = respond(**options)
    assert json.loads(reply.output_text)["a"] in (1, 2)
    assert reply.text.format.schema_ == schema
    response_format = {"type": "json_schema", "json_schema": named}
    expected = chat_text(user(QUESTION), response_format=response_format, max_tokens=60)
    assert reply.output_text == expected


CALL_PAINT = {"type": "function", "name": "paint"}


@pytest.mark.parametrize("choice", [CALL_PAINT, "required"], ids=["named", "required"])
@pytest.mark.parametrize("max_tokens", [60, 1])
def test_call_of_a_chosen_function(respond, client, choice, max_tokens):
    pytest.importorskip("llguidance")
    options = {"tools": [PAINT], "tool_choice": choice, "max_output_tokens": max_tokens}
    reply = respond(**options)
    Response.model_validate(reply.model_dump())
    [call] = reply.output
    chat = client.chat.completions.create(
        model="tiny",
        messages=user(QUESTION),
        max_tokens=max_tokens,
        temperature=0,
        tools=[{"type": "function", "function": PAINT | {"description": "x"}}],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    )
    expected = chat.choices[0].message.tool_calls[0].function
    assert (call.type, call.name, call.arguments) == ("function_call", "paint", expected.arguments)
    status = "completed" if max_tokens == 60 else "incomplete"
    assert reply.status == call.status == status
    if status == "completed":
        assert json.loads(call.arguments)["color"] in ("red", "blue")
    assert reply.tools[0].parameters == PAINT["parameters"]
    events = [
        EVENTS.validate_python(event.model_dump()) for event in respond(stream=True, **options)
    ]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", status]
    assert set(kinds[3:-3]) <= {"function_call_arguments.delta"}  # one token may have no text
    deltas = "".join(event.delta for event in events[3:-3])
    assert deltas == events[-3].arguments == events[-2].item.arguments == call.arguments


def test_earlier_calls_and_their_results_are_read(respond, chat_text):
    call = {"type": "function_call", "call_id": "c", "name": "paint", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "yes"}
    content = [{"role": "user", "content": QUESTION}, call, result]
    called = {"id": "c", "type": "function", "function": {"name": "paint", "arguments": "{}"}}
    messages = [
        *user(QUESTION),
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "yes"},
    ]
    assert respond(content).output_text == chat_text(messages) != respond().output_text


def test_responses_are_not_stored(client, respond):
    stored = respond(store=True).id
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match=stored) as caught:
            call(stored)
        assert caught.value.code == "not_found"
    with pytest.raises(openai.BadRequestError, match=stored) as caught:
        respond(previous_response_id=stored)
    assert caught.value.code == "previous_response_not_found"


IMAGE = input_parts("data:image/png;base64,AAAA", "?")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": IMAGE}]}, "input.0.content.0.image_url"),
        (
            {"input": [{"role": "user", "content": IMAGE}], "instructions": "yes"},
            "input.0.content.0.image_url",
        ),
        ({"input": [{"type": "function_call_output"}]}, "input.0.output"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.arguments"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": []}]}, "input.0.content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input.0.content.0",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -2}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.json_schema"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [PAINT]}, "tools"),
        ({"tools": [PAINT], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"extra_body": {"n": 2}}, "n"),
    ],
)
def test_invalid_requests(client, changes, param):
    request = {"model": "tiny", "input": QUESTION, "max_output_tokens": 3}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**request | changes)
    assert caught.value.param.startswith(param)


@pytest.mark.parametrize("tokens", [4096, 2**31 - 1, -1])
def test_large_numbers_of_tokens_are_clipped_to_the_context(respond, tiny_engine, tokens):
    reply = respond(max_output_tokens=tokens, extra_body={"ignore_eos": True})
    assert (reply.status, reply.max_output_tokens) == ("incomplete", tokens)
    assert reply.usage.total_tokens == tiny_engine.context_length


def test_other_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="other", input=QUESTION)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("a bug"), "server_error"), (InputError("x", ErrorCode.NON_FINITE), "invalid_")],
)
def test_error_in_a_stream_is_a_failed_response(tiny_engine, error, code):
    engine = FakeEngine(tiny_engine)
    with run_app(build_app(engine, "tiny")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        stream = client.responses.create(model="tiny", input=QUESTION, stream=True)
        events = iter(stream)
        assert next(events).type == "response.created"
        wait_until(lambda: engine.requests)
        engine.requests[0].emit("yes")
        engine.requests[0].fail(error)
        *_, last = events
        assert EVENTS.validate_python(last.model_dump()).type == "response.failed"
        assert last.response.status == "failed"
        assert last.response.error.code.startswith(code)
