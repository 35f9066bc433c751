"""The whole way to the engine's rows: requests share its steps, and who leaves is out of them."""

import asyncio
import time

import httpx
import openai
import pytest

from owl2.engine.running_batch import RunningBatch
from tests.serve.running import until

ASKED = [{"role": "user", "content": "what is this?"}]
LONG = {"model": "tiny", "messages": ASKED, "max_tokens": 100, "temperature": 0}


@pytest.fixture
def steps(monkeypatch):
    """How many rows each of the engine's steps had; each takes a while."""
    counts = []
    step = RunningBatch.step

    def slow_step(rows):
        counts.append(len(rows.requests))
        time.sleep(0.02)
        return step(rows)

    monkeypatch.setattr(RunningBatch, "step", slow_step)
    return counts


def test_requests_are_computed_together(server_url, steps):
    async def ask(client, stream):
        reply = await client.chat.completions.create(**LONG, stream=stream)
        if not stream:
            return reply.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="any") as client:
            return await asyncio.gather(*(ask(client, number % 2 == 0) for number in range(8)))

    texts = asyncio.run(ask_all())
    assert len(set(texts)) == 1
    assert max(steps) > 4
    assert len(steps) < sum(steps) / 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_out_of_the_rows(server_url, steps, tiny_engine, stream):
    whole = tiny_engine.complete(ASKED, max_new_tokens=100, temperature=0.0).outputs()
    assert whole[0].num_tokens > 50  # or there would be nothing to leave early
    steps.clear()
    url, body = f"{server_url}/v1/chat/completions", LONG | {"stream": stream}
    if stream:
        with httpx.Client() as client, client.stream("POST", url, json=body) as reply:
            lines = reply.iter_lines()
            assert [next(lines)[:5] for _ in range(5)] == ["data:", "", "data:", "", "data:"]
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
    until(lambda: not tiny_engine.stats().num_running)
    assert len(steps) < whole[0].num_tokens


def test_several_answers_are_computed_together(client, steps):
    reply = client.chat.completions.create(
        **LONG | {"max_tokens": 10, "temperature": 1.0}, n=4, seed=1
    )
    assert len(reply.choices) == 4
    assert len(steps) < 20
    assert max(steps) == 4
