"""Many concurrent clients of several kinds; each checks its answers against the engine's."""

import asyncio
import json
import random
from dataclasses import dataclass, field

import httpx

from tests.engine.conftest import ask, random_image
from tests.serve.images import data_uri, encode

TOKENS = 10
STOP = "e"
SEED = 11


@dataclass(frozen=True)
class Question:
    """Messages and the expected answers; `sampled` has those for SEED and SEED + 1."""

    messages: list
    greedy: str
    stopped: str
    sampled: list


@dataclass
class Result:
    """The number of requests of each kind, and the failures."""

    kinds: dict = field(default_factory=dict)
    failures: list = field(default_factory=list)

    def count(self, kind):
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def questions(engine):
    """Eight questions, some with one or two images, answered one by one.

    Args:
        engine: An engine without caches.
    """
    result = []
    for number in range(8):
        text = ("what is this?", "no", "is it red? " * 3, "a blue circle, 你好")[number % 4]
        images = [random_image(number), random_image(number + 20)][: number // 2 % 3]
        messages = ask(text, *images)
        parts = [
            {"type": "image_url", "image_url": {"url": data_uri(encode(one))}} for one in images
        ]
        sampled = {"max_new_tokens": TOKENS, "temperature": 1.5}
        result.append(
            Question(
                [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
                engine.chat(messages, max_new_tokens=TOKENS),
                engine.chat(messages, max_new_tokens=TOKENS, stop=STOP),
                [engine.chat(messages, seed=SEED + number, **sampled) for number in range(2)],
            )
        )
    return result


def run_clients(url, questions, clients, requests, seed=0):
    """Run `clients` concurrent clients with `requests` requests each."""
    result = Result()

    async def one_client(client, number):
        rng = random.Random(f"{seed} {number}")
        for _ in range(requests):
            question = rng.choice(questions)
            kind = rng.choice(KINDS)
            try:
                await kind(client, question, rng, result)
                result.count(kind.__name__)
            except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
                result.failures.append(f"{kind.__name__}: {error!r}"[:500])

    async def all_clients():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(one_client(client, number) for number in range(clients)))

    asyncio.run(all_clients())
    return result


def body(question, **options):
    greedy = {"model": "tiny", "messages": question.messages, "temperature": 0}
    return greedy | {"max_tokens": TOKENS} | options


async def complete(client, question, rng, result):
    reply = await post(client, body(question))
    assert [choice["message"]["content"] for choice in reply] == [question.greedy]


async def several(client, question, rng, result):
    reply = await post(client, body(question, n=2, temperature=1.5, seed=SEED, logprobs=True))
    assert [choice["message"]["content"] for choice in reply] == question.sampled
    assert all(choice["logprobs"]["content"] for choice in reply)


async def stopped(client, question, rng, result):
    [choice] = await post(client, body(question, stop=[STOP, "never generated"]))
    assert choice["message"]["content"] == question.stopped


async def streamed(client, question, rng, result):
    text = ""
    async with stream(client, body(question)) as reply:
        async for chunk in chunks(reply):
            text += chunk["choices"][0]["delta"].get("content") or ""
    assert text == question.greedy


async def disconnects_from_stream(client, question, rng, result):
    remaining = rng.randrange(1, 5)
    async with stream(client, body(question, max_tokens=60)) as reply:
        async for _ in chunks(reply):
            remaining -= 1
            if not remaining:
                return


async def disconnects_without_answer(client, question, rng, result):
    try:
        async with asyncio.timeout(rng.random() * 0.3):
            await post(client, body(question, max_tokens=60))
    except TimeoutError:
        result.count("disconnected while it waited")


KINDS = (complete, several, stopped, streamed, disconnects_from_stream, disconnects_without_answer)


async def post(client, content):
    reply = await client.post("/v1/chat/completions", json=content)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def stream(client, content):
    return client.stream("POST", "/v1/chat/completions", json=content | {"stream": True})


async def chunks(reply):
    assert reply.status_code == 200, (await reply.aread()).decode()
    done = False
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    assert done, "the stream is incomplete"
