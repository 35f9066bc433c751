"""Structured output over HTTP, with OpenAI's client and as libraries around it use it."""

import json
import threading
import time
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from owl2.engine.structured_output import GrammarCompiler
from tests.serve.images import data_uri, encode, noise

QUESTION = [{"role": "user", "content": "what is this?"}]
LIMIT = {"model": "tiny", "max_tokens": 80}


class Shape(BaseModel):
    color: Literal["red", "dark blue"]
    count: int = Field(ge=0, le=9)


class Shapes(BaseModel):
    shapes: list[Shape] = Field(min_length=1, max_length=1)


def schema_format(model, strict=True):
    schema = {"name": model.__name__, "schema": model.model_json_schema(), "strict": strict}
    return {"type": "json_schema", "json_schema": schema}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2, "seed": 3, "n": 2}])
def test_parse(client, sampling):
    """`.parse()` of OpenAI's client, with an image."""
    image = {"type": "image_url", "image_url": {"url": data_uri(encode(noise()))}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "a red circle"}]}]
    reply = client.chat.completions.parse(
        messages=messages, response_format=Shape, **LIMIT, **sampling
    )
    assert len(reply.choices) == sampling.get("n", 1)
    for choice in reply.choices:
        assert isinstance(choice.message.parsed, Shape)
        assert choice.finish_reason == "stop"


def test_parse_of_a_stream(client):
    options = {"messages": QUESTION, **LIMIT}
    expected = client.chat.completions.parse(response_format=Shape, **options).choices[0].message
    with client.chat.completions.stream(response_format=Shape, **options) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert len(texts) > 1
    assert "".join(texts) == final.content == expected.content
    assert final.parsed == expected.parsed


def test_an_answer_that_is_cut_off(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            messages=QUESTION, response_format=Shape, model="tiny", max_tokens=2
        )


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({"response_format": schema_format(Shape)}, Shape.model_validate_json),
        # As instructor in the mode JSON_SCHEMA, and the AI SDK's `generateObject`.
        ({"response_format": schema_format(Shapes, False)}, Shapes.model_validate_json),
        ({"guided_json": Shape.model_json_schema()}, Shape.model_validate_json),
        ({"guided_json": json.dumps(Shape.model_json_schema())}, Shape.model_validate_json),
        ({"structured_outputs": {"json": {"enum": [1, "a"]}}}, lambda text: text in ("1", '"a"')),
        ({"guided_choice": ["red", "blue"]}, ["red", "blue"].__contains__),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"].__contains__),
        ({"guided_regex": "[ab]{5}c"}, lambda text: len(text) == 6 and text.endswith("c")),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, ["yes", "no"].__contains__),
    ],
)
def test_fields(client, fields, is_valid):
    for stream in (False, True):
        options = {"messages": QUESTION, "extra_body": fields, **LIMIT}
        reply = client.chat.completions.create(**options, stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in reply]
            text, reason = "".join(one.delta.content or "" for one in choices), choices[-1]
        else:
            text, reason = reply.choices[0].message.content, reply.choices[0]
        assert is_valid(text), text
        assert reason.finish_reason == "stop"


def test_json_objects(client):
    """As instructor in the mode JSON: the schema is in the prompt only."""
    options = {"messages": QUESTION, "response_format": {"type": "json_object"}, **LIMIT}
    for seed in range(5):
        reply = client.chat.completions.create(**options, temperature=1, seed=seed).choices[0]
        assert reply.message.content.startswith("{")
        if reply.finish_reason == "stop":
            assert isinstance(json.loads(reply.message.content), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema},
                }
            },
            "response_format",
        )
        for schema in ({"type": "nonsense"}, {"not": {}}, {"$ref": "#/x"}, {"pattern": "("})
    ]
    + [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_grammar": "nonsense"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["x" * 70_000]}}, "structured_outputs"),
    ],
)
def test_invalid_schemas_are_status_400(client, fields, param):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                messages=QUESTION, extra_body=fields, stream=stream, **LIMIT
            )
        assert (caught.value.code, caught.value.param) == ("invalid_value", param)


def test_other_requests_do_not_wait_for_a_compilation(server_url, client, monkeypatch):
    compiles, continues = threading.Event(), threading.Event()
    original = GrammarCompiler.matcher

    def matcher(self, params):
        if params is not None:
            compiles.set()
            assert continues.wait(30)
        return original(self, params)

    monkeypatch.setattr(GrammarCompiler, "matcher", matcher)
    fields = {"guided_choice": ["a very slow one"]}
    options = {"messages": QUESTION, "extra_body": fields, **LIMIT}
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(client.chat.completions.create(**options))
    )
    thread.start()
    assert compiles.wait(30)
    start = time.monotonic()
    assert httpx.get(f"{server_url}/health").status_code == 200
    assert client.chat.completions.create(messages=QUESTION, model="tiny", max_tokens=3).choices
    assert time.monotonic() - start < 15
    continues.set()
    thread.join(30)
    assert replies[0].choices[0].message.content == "a very slow one"
