"""instructor: objects from answers, in each mode without tools."""

from typing import Literal

import instructor
import pytest
from conftest import KEY, MODEL
from instructor import Mode
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field, model_validator


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


class Anything(BaseModel):
    """Any JSON object."""

    name: object = None


@pytest.mark.parametrize(
    ("mode", "schema"),
    [
        (Mode.TOOLS, Shape),
        (Mode.TOOLS, Drawing),
        (Mode.JSON_SCHEMA, Shape),
        (Mode.JSON_SCHEMA, Drawing),
        (Mode.JSON, Anything),
    ],
)
def test_create(base_url, mode, schema):
    found = make_client(base_url, mode).chat.completions.create(
        model=MODEL, messages=TEXT, response_model=schema, max_tokens=200, max_retries=0
    )
    assert isinstance(found, schema)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON])
def test_retries_with_the_errors_of_the_validation(base_url, mode):
    """The second attempt is a conversation with the invalid answer and what is wrong with it."""
    seen = []

    class Strict(Anything):
        """Accepts the second answer."""

        @model_validator(mode="after")
        def _reject_the_first(self):
            seen.append(self)
            if len(seen) == 1:
                raise ValueError("again")
            return self

    make_client(base_url, mode).chat.completions.create(
        model=MODEL, messages=TEXT, response_model=Strict, max_tokens=200, max_retries=2
    )
    assert len(seen) == 2


def test_image(base_url, image_url):
    image = {"type": "image_url", "image_url": {"url": image_url}}
    content = [image, {"type": "text", "text": "what is this?"}]
    client = make_client(base_url, Mode.JSON_SCHEMA)
    found, reply = client.chat.completions.create_with_completion(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        response_model=Shape,
        max_tokens=100,
    )
    assert isinstance(found, Shape)
    assert reply.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_partial_objects(base_url, mode):
    client = make_client(base_url, mode)
    options = {"model": MODEL, "messages": TEXT, "max_tokens": 100}
    *_, last = client.chat.completions.create_partial(response_model=Shape, **options)
    assert last.color in {"red", "green", "blue"}


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
async def test_async_client(base_url, mode):
    client = make_client(base_url, mode, AsyncOpenAI)
    options = {"model": MODEL, "messages": TEXT, "max_tokens": 100}
    assert isinstance(await client.chat.completions.create(response_model=Shape, **options), Shape)
