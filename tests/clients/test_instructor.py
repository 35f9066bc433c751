"""instructor: objects from answers, in each mode without tools."""

from typing import Literal

import instructor
import pytest
from conftest import KEY, MODEL
from instructor import Mode
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field


class Shape(BaseModel):
    """A shape in an image."""

    color: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


class Drawing(BaseModel):
    """Shapes."""

    shapes: list[Shape] = Field(min_length=1, max_length=2)
    background: Literal["white"] | None


TEXT = [{"role": "user", "content": "Return JSON."}]


def make_client(base_url, mode, kind=OpenAI):
    return instructor.from_openai(kind(base_url=base_url, api_key=KEY, max_retries=0), mode=mode)


@pytest.mark.parametrize("mode", [Mode.JSON_SCHEMA, Mode.JSON])
@pytest.mark.parametrize("schema", [Shape, Drawing])
def test_create(base_url, mode, schema):
    options = {"extra_body": {"guided_json": schema.model_json_schema()}}
    client = make_client(base_url, mode)
    found = client.chat.completions.create(
        model=MODEL,
        messages=TEXT,
        response_model=schema,
        max_tokens=200,
        max_retries=0,
        **(options if mode is Mode.JSON else {}),
    )
    assert isinstance(found, schema)


def test_image(base_url, image_url):
    content = [{"type": "image_url", "image_url": {"url": image_url}}, *TEXT[0]["content"].split()]
    content = [content[0], {"type": "text", "text": "what is this?"}]
    client = make_client(base_url, Mode.JSON_SCHEMA)
    found, reply = client.chat.completions.create_with_completion(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        response_model=Shape,
        max_tokens=100,
    )
    assert isinstance(found, Shape)
    assert reply.usage.completion_tokens > 0


def test_partial_objects(base_url):
    client = make_client(base_url, Mode.JSON_SCHEMA)
    options = {"model": MODEL, "messages": TEXT, "max_tokens": 100}
    *_, last = client.chat.completions.create_partial(response_model=Shape, **options)
    assert last.color in {"red", "green", "blue"}


async def test_async_client(base_url):
    client = make_client(base_url, Mode.JSON_SCHEMA, AsyncOpenAI)
    options = {"model": MODEL, "messages": TEXT, "max_tokens": 100}
    assert isinstance(await client.chat.completions.create(response_model=Shape, **options), Shape)
