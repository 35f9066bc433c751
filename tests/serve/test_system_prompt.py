"""System prompts where the model's format has no place for them."""

import pytest

from owl2.errors import InputError
from owl2.serve.system_prompt import merge_system_prompt, supports_system_prompt

WITH_SYSTEM = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
IMAGE = {"type": "image", "image": "x"}


def text(words):
    return {"type": "text", "text": words}


def turn(role, *parts):
    return {"role": role, "content": list(parts)}


def test_it_stands_before_the_words_and_after_the_images():
    messages = [
        turn("system", text("Be short.")),
        turn("system", text("Be kind.")),
        turn("user", IMAGE, text("What"), IMAGE, text("?")),
        turn("assistant", text("A dog.")),
    ]
    given = [dict(message) for message in messages]
    first, *others = merge_system_prompt(messages)
    assert first["role"] == "user"
    assert first["content"] == [
        IMAGE,
        text("Be short.\nBe kind.\n"),
        text("What"),
        IMAGE,
        text("?"),
    ]
    assert others == messages[3:]
    assert messages == given


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [turn("user", text("a"))],
        [turn("system", text("a"))],
        [turn("system", IMAGE), turn("user", text("a"))],
    ],
)
def test_what_stays_as_it_is(messages):
    assert merge_system_prompt(messages) == messages


def test_a_template_that_takes_one(tiny_engine, monkeypatch):
    assert not supports_system_prompt(tiny_engine.processor)
    monkeypatch.setattr(tiny_engine.processor, "chat_template", WITH_SYSTEM)
    assert supports_system_prompt(tiny_engine.processor)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_through_the_api(client, tiny_engine, role):
    messages = [{"role": role, "content": "yes"}, {"role": "user", "content": "what is this?"}]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0
    )
    same = [{"role": "user", "content": "yes\nwhat is this?"}]
    expected = tiny_engine.chat(same, max_new_tokens=8, temperature=0.0)
    assert reply.choices[0].message.content == expected
    with pytest.raises(InputError):
        tiny_engine.chat([{"role": "system", "content": "yes"}, *messages[1:]])
