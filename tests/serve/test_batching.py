"""Concurrent requests share the engine's steps, and a disconnected client leaves the batch."""

import asyncio
import time

import httpx
import openai
import pytest

from owl2.engine.engine_core import EngineCore
from tests.serve.running import wait_until

MESSAGES = [{"role": "user", "content": "what is this?"}]
LONG = {"model": "tiny", "messages": MESSAGES, "max_tokens": 100, "temperature": 0}


@pytest.fixture
def batch_sizes(monkeypatch):
    """The number of sequences in each step of the engine; steps are slowed down."""
    sizes = []

    def on_step(core, num_running):
        sizes.append(num_running)
        time.sleep(0.02)  # the duration of a step of a larger model

    monkeypatch.setattr(EngineCore, "on_step", on_step)
    return sizes


def test_concurrent_requests_are_batched(server_url, batch_sizes):
    async def answer(client, stream):
        reply = await client.chat.completions.create(**LONG, stream=stream)
        if not stream:
            return reply.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def all_answers():
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="any") as client:
            return await asyncio.gather(*(answer(client, number % 2 == 0) for number in range(8)))

    assert len(set(asyncio.run(all_answers()))) == 1
    assert max(batch_sizes) > 4
    assert len(batch_sizes) < sum(batch_sizes) / 2


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_client_leaves_the_batch(server_url, batch_sizes, tiny_engine, stream):
    [output] = tiny_engine.complete(MESSAGES, max_new_tokens=100, temperature=0.0).outputs()
    assert output.num_tokens > 50  # otherwise there is no time to disconnect
    batch_sizes.clear()
    url, body = f"{server_url}/v1/chat/completions", LONG | {"stream": stream}
    if stream:
        with httpx.Client() as client, client.stream("POST", url, json=body) as reply:
            lines = reply.iter_lines()
            assert [next(lines)[:5] for _ in range(5)] == ["data:", "", "data:", "", "data:"]
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
    wait_until(lambda: not tiny_engine.stats().num_running)
    assert len(batch_sizes) < output.num_tokens


def test_answers_of_one_request_are_batched(client, batch_sizes):
    options = LONG | {"max_tokens": 10, "temperature": 1.0}
    reply = client.chat.completions.create(**options, n=4, seed=1)
    assert len(reply.choices) == 4
    assert len(batch_sizes) < 20
    assert max(batch_sizes) == 4
