"""openai-python: chat completions, completions, responses, models and errors."""

import asyncio
from typing import Literal

import httpx
import openai
import pytest
from conftest import KEY, MODEL, data_url
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

TEXT = [{"role": "user", "content": "Hello"}]


class Shape(BaseModel):
    """A schema whose values end by themselves."""

    color: Literal["red", "green", "blue"]
    is_round: bool


@pytest.fixture
def client(base_url):
    with OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def chat(client):
    def chat(messages=TEXT, **options):
        options = {"model": MODEL, "max_tokens": 8} | options
        return client.chat.completions.create(messages=messages, **options)

    return chat


@pytest.fixture
def respond(client):
    def respond(text="Hello", **options):
        options = {"model": MODEL, "max_output_tokens": 24} | options
        return client.responses.create(input=text, **options)

    return respond


def image_messages(url, order=("image", "text")):
    parts = {
        "image": {"type": "image_url", "image_url": {"url": url}},
        "text": {"type": "text", "text": "what is this?"},
    }
    return [{"role": "user", "content": [parts[kind] for kind in order]}]


# ------------------------------------------------------------------ chat completions


@pytest.mark.parametrize("order", [("image", "text"), ("text", "image"), ("image",)])
def test_chat_with_an_image(chat, image_url, order):
    reply = chat(image_messages(image_url, order))
    assert reply.choices[0].message.content
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_image_formats(chat, kind):
    assert chat(image_messages(data_url("blue", kind))).choices[0].message.content


def test_several_images(chat):
    [message] = image_messages(data_url("red"))
    message["content"].insert(0, image_messages(data_url("blue"))[0]["content"][0])
    alone = chat(image_messages(data_url("red"))).usage.prompt_tokens
    assert chat([message]).usage.prompt_tokens > alone


CONVERSATIONS = {
    "system": [{"role": "system", "content": "Be brief."}, *TEXT],
    "developer": [{"role": "developer", "content": "Be brief."}, *TEXT],
    "turns": [*TEXT, {"role": "assistant", "content": "hi"}, *TEXT],
    "two of one role": [*TEXT, *TEXT],
    "assistant first": [{"role": "assistant", "content": "hi"}, *TEXT],
    "empty answer": [*TEXT, {"role": "assistant", "content": ""}, *TEXT],
    "null answer": [*TEXT, {"role": "assistant", "content": None}, *TEXT],
    "name": [{"role": "user", "name": "ada", "content": "Hello"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(chat, messages):
    assert chat(messages).choices[0].message.role == "assistant"


OPTIONS = [
    {"temperature": 0.7, "top_p": 0.9, "seed": 1},
    {"n": 2, "temperature": 1.0},
    {"stop": ["zzz"]},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {"5": -100}},
    {"logprobs": True, "top_logprobs": 2},
    {"logprobs": False, "top_logprobs": 0},
    {"max_tokens": 100_000},
    {"max_tokens": openai.omit, "max_completion_tokens": 5},
    {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    {"response_format": {"type": "text"}},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"extra_body": {"top_k": 5, "repetition_penalty": 1.1, "min_p": 0.1}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_chat_options(chat, options):
    reply = chat(**options)
    assert len(reply.choices) == options.get("n", 1)
    assert (reply.choices[0].logprobs is not None) == options.get("logprobs", False)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_streamed_chat_has_the_same_text(chat, options):
    options = {"stream_options": {"include_usage": True}, "seed": 3} | options
    texts = {}
    for chunk in chat(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    options.pop("stream_options")
    reply = chat(**options)
    assert list(texts.values()) == [choice.message.content for choice in reply.choices]
    assert chunk.usage == reply.usage


def test_tokens_of_logprobs_joined_equal_the_content(chat):
    [choice] = chat(logprobs=True).choices
    data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert data.decode().strip() == choice.message.content


def test_chat_parse(client):
    reply = client.chat.completions.parse(
        model=MODEL, messages=TEXT, response_format=Shape, max_tokens=60
    )
    assert isinstance(reply.choices[0].message.parsed, Shape)


def test_stream_helper_with_a_schema(client):
    with client.chat.completions.stream(
        model=MODEL, messages=TEXT, response_format=Shape, max_tokens=60
    ) as stream:
        kinds = {event.type for event in stream}
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, Shape)


def test_json_object(chat):
    reply = chat(response_format={"type": "json_object"}, max_tokens=200)
    assert reply.choices[0].message.content.startswith("{")


def test_async_client(base_url, image_url):
    async def ask():
        async with AsyncOpenAI(base_url=base_url, api_key=KEY) as client:
            create = client.chat.completions.create
            requests = [
                create(model=MODEL, messages=image_messages(image_url), max_tokens=4)
                for _ in range(4)
            ]
            return await asyncio.gather(*requests)

    assert len({reply.choices[0].message.content for reply in asyncio.run(ask())}) == 1


# ------------------------------------------------------------------ responses


def image_input(url):
    content = [
        {"type": "input_text", "text": "what is this?"},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    return [{"role": "user", "content": content}]


def test_response(respond, chat):
    reply = respond()
    assert reply.output_text == chat(max_tokens=24).choices[0].message.content
    assert reply.status == "completed"
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert respond(max_output_tokens=1).status == "incomplete"


def test_response_with_an_image(respond, image_url):
    assert respond(image_input(image_url)).output_text


def test_conversation_of_responses(respond):
    first = respond()
    earlier = [item.model_dump() for item in first.output]
    second = respond([{"role": "user", "content": "Hello"}, *earlier, *TEXT], instructions="Hm.")
    assert second.usage.input_tokens > first.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        respond(previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


@pytest.mark.parametrize(
    "options",
    [{"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"max_output_tokens": 2}],
    ids=["logprobs", "incomplete"],
)
def test_events_of_responses(respond, options):
    adapter = TypeAdapter(ResponseStreamEvent)
    events = list(respond(stream=True, **options))
    for event in events:
        assert adapter.validate_python(event.model_dump(), strict=True) == event
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == respond(**options).output_text == events[-1].response.output_text


def test_parse_and_stream_of_responses(client):
    options = {"model": MODEL, "input": "Hello", "text_format": Shape, "max_output_tokens": 60}
    assert isinstance(client.responses.parse(**options).output_parsed, Shape)
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert isinstance(stream.get_final_response().output_parsed, Shape)


def test_responses_are_not_stored(client, respond):
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(respond(store=True).id)


# ------------------------------------------------------------------ completions, models, errors


@pytest.mark.parametrize("prompt", ["USER: Hello", ["USER: Hello", "USER: a"], [1, 30, 31]])
def test_completions(client, prompt):
    options = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "logprobs": 2, "echo": True}
    reply = client.completions.create(**options)
    texts = [""] * len(reply.choices)
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]
    assert len(texts) == (2 if isinstance(prompt[0], str) and len(prompt) == 2 else 1)


def test_models(client):
    [model] = client.models.list()
    assert client.models.retrieve(model.id).id == MODEL


ERRORS = [
    ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
    ({"messages": []}, openai.BadRequestError, "invalid_value"),
    ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
    ({"messages": image_messages("data:image/png;base64,AAAA")}, openai.BadRequestError, None),
    ({"messages": image_messages("https://a.b/c.png")}, openai.BadRequestError, None),
    ({"messages": [{"role": "user", "content": "a " * 9000}]}, openai.BadRequestError, None),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, None),
]


@pytest.mark.parametrize(("options", "error", "code"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(chat, options, error, code, stream):
    with pytest.raises(error) as caught:
        chat(**options, stream=stream)
    assert code is None or caught.value.code == code
    assert caught.value.request_id


def test_key_and_path(base_url):
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        OpenAI(base_url=base_url, api_key=KEY).embeddings.create(model=MODEL, input="a")


def test_retries(base_url):
    """The client repeats a request after a response with status 503, as during a restart."""
    seen = []

    class Busy(httpx.HTTPTransport):
        def handle_request(self, request):
            seen.append(request)
            if len(seen) < 3:
                return httpx.Response(503, headers={"Retry-After": "0"})
            return super().handle_request(request)

    http_client = httpx.Client(transport=Busy())
    client = OpenAI(base_url=base_url, api_key=KEY, max_retries=2, http_client=http_client)
    reply = client.chat.completions.create(model=MODEL, messages=TEXT, max_tokens=2)
    assert reply.choices[0].message.content
    assert len(seen) == 3
    assert client.with_options(max_retries=0).with_raw_response.models.list().status_code == 200
