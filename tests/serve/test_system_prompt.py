"""System prompts of requests, for a chat template without a system role."""

import pytest


@pytest.mark.parametrize("role", ["system", "developer"])
def test_api_merges_system_prompt(client, tiny_engine, role):
    messages = [{"role": role, "content": "yes"}, {"role": "user", "content": "what is this?"}]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0
    )
    same = [{"role": "user", "content": "yes\nwhat is this?"}]
    expected = tiny_engine.chat(same, max_new_tokens=8, temperature=0.0)
    assert reply.choices[0].message.content == expected
