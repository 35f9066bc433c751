"""System prompts for chat templates with and without a system role."""

import pytest

from owl2.errors import ErrorCode
from owl2.serve.chat_completions import merge_system_prompt, supports_system_prompt
from tests.errors import raises_input_error

WITH_SYSTEM = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
IMAGE = {"type": "image", "image": "x"}


def text(value):
    return {"type": "text", "text": value}


def message(role, *parts):
    return {"role": role, "content": list(parts)}


def test_system_prompt_precedes_text_and_follows_leading_images():
    messages = [
        message("system", text("Be short.")),
        message("system", text("Be kind.")),
        message("user", IMAGE, text("What"), IMAGE, text("?")),
        message("assistant", text("A dog.")),
    ]
    copy = [dict(message) for message in messages]
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
    assert messages == copy


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [message("user", text("a"))],
        [message("system", text("a"))],
        [message("system", IMAGE), message("user", text("a"))],
    ],
)
def test_other_messages_are_not_changed(messages):
    assert merge_system_prompt(messages) == messages


def test_templates_with_and_without_system_role(tiny_engine, monkeypatch):
    assert not supports_system_prompt(tiny_engine.processor)
    monkeypatch.setattr(tiny_engine.processor, "chat_template", WITH_SYSTEM)
    assert supports_system_prompt(tiny_engine.processor)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_api_merges_system_prompt(client, tiny_engine, role):
    messages = [{"role": role, "content": "yes"}, {"role": "user", "content": "what is this?"}]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0
    )
    same = [{"role": "user", "content": "yes\nwhat is this?"}]
    expected = tiny_engine.chat(same, max_new_tokens=8, temperature=0.0)
    assert reply.choices[0].message.content == expected
    with raises_input_error(ErrorCode.UNSUPPORTED):
        tiny_engine.chat([{"role": "system", "content": "yes"}, *messages[1:]])
