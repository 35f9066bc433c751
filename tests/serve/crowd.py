"""Many clients at once, of all kinds: each checks that it gets what it would get alone."""

import asyncio
import base64
import io
import json
import random
from dataclasses import dataclass, field

import httpx

from tests.engine.conftest import ask, image

TOKENS = 10
STOP = "e"
SEED = 11


@dataclass(frozen=True)
class Question:
    """As it is sent, and what the answers are; `sampled` for the seeds SEED and SEED + 1."""

    messages: list
    greedy: str
    stopped: str
    sampled: list


@dataclass
class Seen:
    """What became of the requests: how many of each kind, and what went wrong."""

    kinds: dict = field(default_factory=dict)
    wrong: list = field(default_factory=list)

    def count(self, kind):
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def questions(engine):
    """8, half of them with one image or two, answered one by one.

    Args:
        engine: one that keeps nothing.
    """
    made = []
    for number in range(8):
        text = ("what is this?", "no", "is it red? " * 3, "a blue circle, 你好")[number % 4]
        images = [image(number), image(number + 20)][: number // 2 % 3]
        asked = ask(text, *images)
        parts = [{"type": "image_url", "image_url": {"url": data_uri(one)}} for one in images]
        sampled = {"max_new_tokens": TOKENS, "temperature": 1.5}
        made.append(
            Question(
                [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
                engine.chat(asked, max_new_tokens=TOKENS),
                engine.chat(asked, max_new_tokens=TOKENS, stop=STOP),
                [engine.chat(asked, seed=SEED + number, **sampled) for number in range(2)],
            )
        )
    return made


def data_uri(one):
    file = io.BytesIO()
    one.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def visit(url, asked, clients, requests, seed=0):
    """Let so many clients each make so many requests; → what they saw."""
    seen = Seen()

    async def one_client(client, number):
        source = random.Random(f"{seed} {number}")
        for _ in range(requests):
            question = source.choice(asked)
            kind = source.choice(KINDS)
            try:
                await kind(client, question, source, seen)
                seen.count(kind.__name__)
            except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
                seen.wrong.append(f"{kind.__name__}: {error!r}"[:500])

    async def all_clients():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(one_client(client, number) for number in range(clients)))

    asyncio.run(all_clients())
    return seen


def body(question, **options):
    greedy = {"model": "tiny", "messages": question.messages, "temperature": 0}
    return greedy | {"max_tokens": TOKENS} | options


async def whole(client, question, source, seen):
    reply = await post(client, body(question))
    assert [choice["message"]["content"] for choice in reply] == [question.greedy]


async def several(client, question, source, seen):
    reply = await post(client, body(question, n=2, temperature=1.5, seed=SEED, logprobs=True))
    assert [choice["message"]["content"] for choice in reply] == question.sampled
    assert all(choice["logprobs"]["content"] for choice in reply)


async def stopped(client, question, source, seen):
    [choice] = await post(client, body(question, stop=[STOP, "never to be seen"]))
    assert choice["message"]["content"] == question.stopped


async def streamed(client, question, source, seen):
    text = ""
    async with stream(client, body(question)) as reply:
        async for chunk in chunks(reply):
            text += chunk["choices"][0]["delta"].get("content") or ""
    assert text == question.greedy


async def leaves_a_stream(client, question, source, seen):
    left = source.randrange(1, 5)
    async with stream(client, body(question, max_tokens=60)) as reply:
        async for _ in chunks(reply):
            left -= 1
            if not left:
                return


async def leaves_without_an_answer(client, question, source, seen):
    try:
        async with asyncio.timeout(source.random() * 0.3):
            await post(client, body(question, max_tokens=60))
    except TimeoutError:
        seen.count("left while it waited")


KINDS = (whole, several, stopped, streamed, leaves_a_stream, leaves_without_an_answer)


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
    assert done, "the stream was cut"
