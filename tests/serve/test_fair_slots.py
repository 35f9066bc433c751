"""Fair slots: the order in which clients and requests receive them, limits, and cancellation."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from owl2.serve.fair_slots import FairSlots, run_with_slots


def order(size, owners, per_client=None):
    """The order in which owners receive slots that become free one by one, in order of receipt."""

    async def run():
        slots = FairSlots(size, per_client)
        received = []
        tasks = []

        async def wait(owner):
            await slots.acquire(owner)
            received.append(owner)

        for owner in owners:
            tasks.append(asyncio.ensure_future(wait(owner)))
            await asyncio.sleep(0)
        done = 0
        while done < len(owners):
            slots.release(received[done])
            done += 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return ["".join(map(str, owner)) for owner in received]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("size", "owners", "expected"),
    [
        (1, ["a", "a", "a", "b"], "a b a a"),
        (1, ["a", "a", "a", "b", "b", "c"], "a b c a b a"),
        (2, ["a", "a", "a", "a", "b", "b"], "a a b a b a"),
        (1, ["a1", "a1", "a1", "a2"], "a1 a2 a1 a1"),
        (1, ["a1", "a1", "a2", "b1", "b1"], "a1 b1 a2 b1 a1"),
        (5, ["a", "b", "a"], "a b a"),
    ],
)
def test_clients_and_requests_take_turns(size, owners, expected):
    assert " ".join(order(size, [tuple(owner) for owner in owners])) == expected


def test_limit_of_a_client():
    async def run():
        slots = FairSlots(3, per_client=2)
        waiting = [asyncio.ensure_future(slots.acquire(("a",))) for _ in range(3)]
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, True, False]
        await slots.acquire(("b",))
        slots.release(("a",))
        await waiting[2]

    asyncio.run(run())


def test_cancelled_tasks_leave_no_slot_occupied():
    async def run():
        slots = FairSlots(1)
        for yields in range(3):  # before, in and after the step in which the slot becomes free
            await slots.acquire(("a",))
            waiting = asyncio.ensure_future(slots.acquire(("b",)))
            await asyncio.sleep(0)
            if yields == 0:
                waiting.cancel()
            slots.release(("a",))
            if yields == 1:
                waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            if not waiting.cancelled():
                slots.release(("b",))
        await asyncio.wait_for(slots.acquire(("c",)), 1)

    asyncio.run(run())


def test_function_occupies_its_slots_until_it_ends():
    finish = threading.Event()

    async def run():
        slots = [FairSlots(1), FairSlots(1)]
        with ThreadPoolExecutor(2) as pool:
            first = asyncio.ensure_future(run_with_slots(slots, ("a",), pool, finish.wait))
            await asyncio.sleep(0.01)
            first.cancel()
            second = asyncio.ensure_future(run_with_slots(slots, ("b",), pool, lambda: "b"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(second), 0.05)
            finish.set()
            assert await second == "b"

    asyncio.run(run())


def test_an_error_after_the_cancellation_is_not_logged(caplog):
    def fail():
        finish.wait(5)
        raise ValueError

    finish = threading.Event()

    async def run():
        with ThreadPoolExecutor(1) as pool:
            task = asyncio.ensure_future(run_with_slots([FairSlots(1)], ("a",), pool, fail))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            finish.set()
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(run())
    assert caplog.text == ""
