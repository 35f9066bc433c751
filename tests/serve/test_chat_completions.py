"""What the official client gets of the API, beside what the engine answers itself."""

import base64
import io

import httpx
import openai
import pytest
from PIL import Image

QUESTION = "what is this?"


def data_uri(colour="red", kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(*parts):
    """A user's turn; a part that is a data-URI is an image."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


ASKED = {
    "text": [{"role": "user", "content": QUESTION}],
    "image": user(data_uri(), QUESTION),
    "images": user(data_uri(), "or", data_uri("blue", "JPEG"), QUESTION),
    "turns": [
        *user(data_uri("green"), QUESTION),
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "yes or no"},
    ],
}


@pytest.fixture
def ask(client):
    def ask(messages=ASKED["text"], **options):
        options = {"max_tokens": 12, "temperature": 0} | options
        return client.chat.completions.create(model="tiny", messages=messages, **options)

    return ask


def told(tiny_engine, messages, n=1, **options):
    options = {"max_new_tokens": 12, "temperature": 0.0} | options
    with tiny_engine.complete(messages, n=n, **options) as completion:
        return completion.outputs()


@pytest.mark.parametrize("messages", ASKED.values(), ids=ASKED)
def test_the_answer_is_the_engines(ask, tiny_engine, messages):
    reply = ask(messages)
    [answer] = told(tiny_engine, messages)
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


@pytest.mark.parametrize("messages", ASKED.values(), ids=ASKED)
def test_streamed_and_whole_are_the_same(ask, messages):
    whole = ask(messages)
    chunks = list(ask(messages, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == whole.choices[0].message.content
    assert sum(map(bool, deltas)) > 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_the_clients_own_gathering_of_a_stream(client, ask):
    # It takes an answer that is as long as it may be for none at all, so this one is stopped.
    options = {"max_tokens": 12, "temperature": 0, "logprobs": True}
    options["stop"] = ask().choices[0].message.content[6:9]
    whole = ask(**options)
    asked = {"model": "tiny", "messages": ASKED["text"]}
    with client.chat.completions.stream(**asked, **options) as stream:
        events = [event.type for event in stream]
        gathered = stream.get_final_completion()
    assert "content.delta" in events
    assert gathered.choices[0].message.content == whole.choices[0].message.content
    assert gathered.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    tokens = gathered.choices[0].logprobs.content
    assert [token.token for token in tokens] == [
        token.token for token in whole.choices[0].logprobs.content
    ]


def test_usage_at_the_end_of_a_stream(ask):
    *chunks, last = ask(stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == ask().usage
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)


def test_a_stream_is_events_and_ends_with_done(server_url):
    body = {"model": "tiny", "messages": ASKED["text"], "max_tokens": 3, "stream": True}
    reply = httpx.post(f"{server_url}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_log_probabilities(ask, tiny_engine):
    reply = ask(logprobs=True, top_logprobs=3)
    [answer] = told(tiny_engine, ASKED["text"], top_logprobs=3)
    got = reply.choices[0].logprobs.content
    assert len(got) == len(answer.logprobs) > 3
    for mine, theirs in zip(got, answer.logprobs, strict=True):
        assert (mine.token, mine.bytes) == (theirs.text, theirs.bytes or None)
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [top.token for top in mine.top_logprobs] == [top.text for top in theirs.top]
        assert len(mine.top_logprobs) == 3
    chunks = list(ask(logprobs=True, top_logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [token for part in parts if part is not None for token in part.content]
    assert [token.token for token in streamed] == [token.token for token in got]
    assert ask(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_several_answers(ask, tiny_engine):
    options = {"n": 3, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    reply = ask(**options)
    answers = told(tiny_engine, ASKED["text"], **options)
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
def test_stop_strings_are_not_shown(ask, stream):
    text = ask().choices[0].message.content
    stop = text[3:6]
    reply = ask(stop=[stop, "never said"], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in reply]
        content = "".join(choice.delta.content or "" for choice in chunks)
        reason = chunks[-1].finish_reason
    else:
        content, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert content == text[: text.index(stop)]
    assert reason == "stop"


def test_the_same_seed_is_the_same_answer(ask):
    texts = [ask(temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_max_tokens(ask):
    reply = ask(max_tokens=2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2
    assert ask(max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


def test_the_models(client):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "owl2")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("org/other")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other'"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": user("   ")}, openai.BadRequestError, "is empty"),
        ({"messages": user("what is " * 200)}, openai.BadRequestError, "context is 128"),
        ({"messages": user("data:image/png;base64,AAAA", "?")}, openai.BadRequestError, "image"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"max_tokens": 10**5}, openai.BadRequestError, "2048"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_the_clients_classes(client, changes, error, words, stream):
    request = {"model": "tiny", "messages": ASKED["text"], "max_tokens": 3, "stream": stream}
    with pytest.raises(error, match=words) as caught:
        client.chat.completions.create(**request | changes)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body["message"]


def test_a_prompt_that_does_not_fit_has_openais_code(ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(user("what is " * 200))
    assert caught.value.code == "context_length_exceeded"


async def _together(url, requests):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        import asyncio

        return await asyncio.gather(
            *(client.chat.completions.create(**request) for request in requests)
        )


def test_requests_at_the_same_time_are_answered_as_if_alone(server_url, ask):
    import asyncio

    requests = [
        {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
        for messages in ASKED.values()
    ] * 4
    replies = asyncio.run(_together(server_url, requests))
    alone = [ask(messages).choices[0].message.content for messages in ASKED.values()]
    assert [reply.choices[0].message.content for reply in replies] == alone * 4


def test_nobody_spoils_the_answers_of_others(server_url, ask):
    import asyncio

    request = {"model": "tiny", "messages": ASKED["text"], "max_tokens": 12}
    replies = asyncio.run(
        _together(server_url, [request | {"temperature": cold} for cold in (0, 1e-300, 0, 1e-44)])
    )
    alone = ask().choices[0].message.content
    assert [reply.choices[0].message.content for reply in replies] == [alone] * 4
