"""Fairness between clients: the queue, the preparation of images, and what a client is."""

import asyncio
from hashlib import sha256

import pytest

from owl2.serve.admission import AdmissionController, InflightBytes, current_client
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.metrics import Metrics
from owl2.serve.middleware import AuthAndBodyLimitMiddleware
from tests.serve.running import FakeEngine


def test_full_queue_rejects_the_client_with_the_most_requests(tiny_engine):
    limits = ServerLimits(max_num_seqs=1, max_queued=3)
    admission = AdmissionController(FakeEngine(tiny_engine), limits, Metrics())
    results = []

    async def no_messages():
        return [[]]

    async def arrive(client, number):
        current_client.set(client)
        try:
            with admission.admit() as stream:
                await stream.start(no_messages, {})
                results.append(f"{client}{number}")
        except ApiError as error:
            assert (error.status, error.code) == (429, "rate_limit_exceeded")
            results.append(f"-{client}{number}")

    async def arrive_all():
        current_client.set("first")
        with admission.admit() as running:
            await running.start(no_messages, {})
            waiting = []
            for client in "aaaabbc":
                waiting.append(asyncio.ensure_future(arrive(client, len(waiting))))
                for _ in range(5):
                    await asyncio.sleep(0)
            rejected = list(results)
            running.close()
            await asyncio.gather(*waiting)
        return rejected, results[len(rejected) :]

    # Of three places, a0, a1 and a2 have the first; b4 and c6 replace a2 and a1.
    rejected, answered = asyncio.run(arrive_all())
    assert rejected == ["-a3", "-a2", "-b5", "-a1"]
    assert answered == ["a0", "b4", "c6"]


def test_clients_take_turns_in_the_queue(tiny_engine):
    limits = ServerLimits(max_num_seqs=1, max_queued=20)
    admission = AdmissionController(FakeEngine(tiny_engine), limits, Metrics())
    order = []

    async def no_messages():
        return [[]]

    async def arrive(client):
        current_client.set(client)
        with admission.admit() as stream:
            await stream.start(no_messages, {})
            order.append(client)
            await asyncio.sleep(0.01)

    async def arrive_all():
        await asyncio.gather(*map(arrive, "aaaaaaabc"))

    asyncio.run(arrive_all())
    assert order[0] == "a"
    assert "".join(order).index("b") <= 3
    assert "".join(order).index("c") <= 4


def test_slow_images_of_a_client_do_not_delay_others(tiny_engine):
    limits = ServerLimits(max_num_seqs=4)
    admission = AdmissionController(FakeEngine(tiny_engine), limits, Metrics())

    async def slow():
        await asyncio.sleep(60)
        return [[]]

    async def fast():
        return [[]]

    async def start(client, messages):
        current_client.set(client)
        with admission.admit() as stream:
            await stream.start(messages, {})

    async def run():
        blocked = [asyncio.ensure_future(start("a", slow)) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.wait_for(start("b", fast), 5)
        for task in blocked:
            task.cancel()
        await asyncio.gather(*blocked, return_exceptions=True)
        await asyncio.wait_for(start("a", fast), 5)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("keys", "address", "authorization", "client"),
    [
        (None, "10.1.2.3", "Bearer ignored", "10.1.2.3"),
        (None, "2001:db8:1:2:3::4", "", "2001:db8:1:2::/64"),
        (None, "a socket", "", "a socket"),
        (["a-long-key"], "10.1.2.3", "Bearer a-long-key", sha256(b"a-long-key").hexdigest()),
    ],
)
def test_client_is_the_key_or_the_address(keys, address, authorization, client):
    found = []

    async def app(scope, receive, send):
        found.append(current_client.get())

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    keys = None if keys is None else ApiKeys(keys)
    middleware = AuthAndBodyLimitMiddleware(app, ServerLimits(), InflightBytes(1), keys)
    scope = {"type": "http", "method": "GET", "path": "/v1", "client": (address, 1)}
    scope["headers"] = [(b"authorization", authorization.encode())]
    asyncio.run(middleware(scope, receive, None))
    assert found == [client]
