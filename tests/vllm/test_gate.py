"""The gate with an engine that is none: no request is served by another task's weights."""

import asyncio
import random

import pytest
from hypothesis import given, settings, strategies as st

from zflora_vllm.gate import BrokenError, Gate, SwitchError

# Its task, when it arrives and how long it runs in milliseconds, and whether its client leaves.
REQUEST = st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 8), st.booleans())


class Engine:
    """Weights of a task, and the requests that run."""

    def __init__(self, fails: float, seed: int, patience: float) -> None:
        self.task, self.running, self.fails, self.random = "", 0, fails, random.Random(seed)
        self.gate = Gate(self.switch, patience)

    async def switch(self, task: str) -> None:
        assert self.running == 0
        self.task = "half"
        await asyncio.sleep(0.001)
        if self.random.random() < self.fails:
            self.task = self.gate.task
            raise SwitchError(task)
        self.task = task


async def request(engine, task, arrives, runs, leaves):
    await asyncio.sleep(arrives / 1000)
    client = asyncio.current_task()
    if leaves:
        asyncio.get_running_loop().call_later(runs / 2000, client.cancel)
    try:
        async with engine.gate.using(task):
            engine.running += 1
            try:
                assert engine.task == task
                await asyncio.sleep(runs / 1000)
                assert engine.task == task
            finally:
                engine.running -= 1
        return "served"
    except SwitchError:
        return "refused"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(REQUEST, min_size=1, max_size=25), st.sampled_from([0.0, 0.4]), st.integers(0, 9))
def test_requests_are_served_by_their_own_task(requests, fails, seed):
    async def play():
        engine = Engine(fails, seed, patience=0.004)
        gate, made = engine.gate, [asyncio.ensure_future(request(engine, *of)) for of in requests]
        done = await asyncio.wait_for(asyncio.gather(*made, return_exceptions=True), 20)
        for found, (*_, leaves) in zip(done, requests, strict=True):
            left = isinstance(found, asyncio.CancelledError) and leaves
            assert left or found == "served" or (found == "refused" and fails), found
        assert gate.running == engine.running == 0 and not gate.broken
        engine.fails = 0.0
        assert await request(engine, "b", 0, 0, False) == "served"  # it still works

    asyncio.run(play())


@pytest.mark.parametrize("patience", [0, 9])
def test_a_stream_of_one_task_does_not_starve_another(patience):
    """A request of another task is passed by those of the current one until it loses patience."""

    async def play():
        gate = Gate(Engine(0.0, 0, 0).switch, patience)
        await gate.enter("")
        other, later = (asyncio.ensure_future(gate.enter(task)) for task in ("b", ""))
        await asyncio.sleep(0.001)
        assert not other.done() and later.done() == bool(patience)
        for _ in range(gate.running):
            gate.leave()
        await asyncio.wait_for(other, 5)
        assert gate.task == "b" and gate.running == 1
        gate.leave()
        await asyncio.wait_for(later, 5)

    asyncio.run(play())


def test_a_request_that_leaves_as_it_is_let_in_is_not_counted():
    async def play():
        async def switch(task):
            pass

        gate = Gate(switch)
        client = asyncio.ensure_future(gate.enter("a"))
        while not gate.running:
            await asyncio.sleep(0)
        assert not client.done()
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        assert gate.running == 0 and client.cancelled()

    asyncio.run(play())


def test_half_written_weights_serve_nobody():
    async def play():
        async def switch(task):
            raise OSError("lost")

        gate = Gate(switch)
        first, second = (asyncio.ensure_future(enter(gate, task)) for task in "ab")
        for found in await asyncio.gather(first, second, return_exceptions=True):
            assert isinstance(found, BrokenError) and "half written" in str(found)
        with pytest.raises(BrokenError, match="restart the server"):
            await enter(gate, "")

    asyncio.run(play())


async def enter(gate, task):
    async with gate.using(task):
        pass


def test_a_client_that_leaves_during_a_change_does_not_end_it():
    async def play():
        written, go = [], asyncio.Event()

        async def switch(task):
            await go.wait()
            written.append(task)

        gate = Gate(switch)
        client = asyncio.ensure_future(enter(gate, "a"))
        await asyncio.sleep(0.001)
        client.cancel()
        await asyncio.wait([client])
        go.set()
        await asyncio.wait_for(enter(gate, "a"), 1)
        assert written == ["a"] and gate.task == "a" and gate.running == 0

    asyncio.run(play())
