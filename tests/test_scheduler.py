"""Tests of who owns the engine and whose turn it is, with an engine of counters: no model."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from gptjax.generation.requests import Piece, Request, Token
from gptjax.serve.scheduler import Busy, Group, Scheduler, Stopped


class Counters:
    """An engine whose requests count: one token a step, when `gate` is open."""

    def __init__(self, slots: int = 2):
        self.slots, self.running, self.added = slots, dict[int, list[int]](), list[int]()
        self.gate, self.threads, self.fault = threading.Event(), set[int](), False
        self.gate.set()

    @property
    def free(self) -> int:
        return self.slots - len(self.running)

    def add(self, request: Request) -> int:
        self.threads.add(threading.get_ident())
        if request.prompt[0] < 0:
            raise ValueError("a negative prompt")
        self.added.append(int(request.prompt[0]))
        self.running[len(self.added)] = [int(request.prompt[0]), request.max_new_tokens]
        return len(self.added)

    def cancel(self, id_: int) -> None:
        self.threads.add(threading.get_ident())
        del self.running[id_]

    def step(self, seconds: float) -> dict[int, Piece]:
        self.threads.add(threading.get_ident())
        self.gate.wait(20)
        if self.fault:
            raise RuntimeError("the device is on fire")
        pieces = {}
        for id_, counter in list(self.running.items()):
            counter[0], counter[1] = counter[0] + 1, counter[1] - 1
            done = counter[1] == 0
            if done:
                del self.running[id_]
            token = Token(counter[0], f"{counter[0]} ", 0.0, ())
            pieces[id_] = Piece(token.text, (token,), "length" if done else None)
        return pieces


def request(start: int, tokens: int = 3) -> Request:
    return Request(np.array([start], np.int32), tokens)


async def texts(group: Group) -> list[str]:
    found = [""] * len(group.streams)
    async for index, piece in group:
        found[index] += piece.text
    return found


Use = Callable[[Scheduler, Counters], Coroutine[Any, Any, None]]


def with_scheduler(use: Use, queue: int = 64) -> Counters:
    """Run a function in an event loop, then close the scheduler."""
    engine = Counters()
    scheduler = Scheduler(lambda: engine, engine.slots, queue)  # pyright: ignore
    try:
        asyncio.run(asyncio.wait_for(use(scheduler, engine), 20))
    finally:
        engine.gate.set()
        scheduler.close()
    return engine


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_more_requests_than_slots_each_get_their_own_text():
    async def use(scheduler: Scheduler, engine: Counters) -> None:
        groups = [scheduler.submit([request(10 * i), request(10 * i + 5)]) for i in range(4)]
        for i, found in enumerate(await asyncio.gather(*map(texts, groups))):
            expected = [" ".join(str(s + k) for k in (1, 2, 3)) for s in (10 * i, 10 * i + 5)]
            assert [text.strip() for text in found] == expected
        assert scheduler.idle

    engine = with_scheduler(use)
    assert engine.added == [0, 5, 10, 15, 20, 25, 30, 35]  # first come, first served
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


def test_one_more_than_may_wait_is_refused_and_none_of_its_group_runs():
    async def use(scheduler: Scheduler, engine: Counters) -> None:
        engine.gate.clear()
        running = scheduler.submit([request(1), request(2), request(3)])  # one of them waits
        with pytest.raises(Busy, match="3 requests are running or waiting; try again later"):
            scheduler.submit([request(4), request(5)])
        waiting = scheduler.submit([request(6)])
        engine.gate.set()
        await asyncio.gather(texts(running), texts(waiting))
        assert engine.added == [1, 2, 3, 6]

    with_scheduler(use, queue=2)


def test_who_leaves_frees_its_slot_and_its_place_in_the_queue():
    async def use(scheduler: Scheduler, engine: Counters) -> None:
        endless = scheduler.submit([request(0, 10**9), request(0, 10**9)])
        leaving = scheduler.submit([request(100)])
        staying = scheduler.submit([request(7)])
        await until(lambda: len(engine.running) == 2)
        leaving.cancel()
        endless.cancel()
        assert await texts(staying) == ["8 9 10 "]
        assert engine.added == [0, 0, 7]  # the one that left the queue was never begun
        await until(lambda: not engine.running and scheduler.idle)

    with_scheduler(use)


def test_a_request_that_the_engine_refuses_harms_no_other():
    async def use(scheduler: Scheduler, engine: Counters) -> None:
        good, bad = scheduler.submit([request(1)]), scheduler.submit([request(-1)])
        with pytest.raises(ValueError, match="a negative prompt"):
            await texts(bad)
        assert await texts(good) == ["2 3 4 "]

    with_scheduler(use)


def test_after_a_fault_of_the_engine_there_is_a_new_one(capfd):
    engines = [Counters(1), Counters(1)]
    made = iter(engines)
    scheduler = Scheduler(lambda: next(made), 1)  # pyright: ignore

    async def use() -> None:
        engines[0].fault = True
        hit, waiting = scheduler.submit([request(1)]), scheduler.submit([request(5)])
        with pytest.raises(RuntimeError, match="on fire"):
            await texts(hit)
        assert await texts(waiting) == ["6 7 8 "]

    asyncio.run(asyncio.wait_for(use(), 20))
    scheduler.close()
    assert engines[1].added == [5]
    assert "the device is on fire" in capfd.readouterr().err  # for whoever runs the server


def test_an_engine_that_cannot_be_made_is_the_callers_error():
    def no() -> Any:
        raise ValueError("too little memory")

    with pytest.raises(ValueError, match="too little memory"):
        Scheduler(no, 1)


def test_closing_ends_who_waits():
    async def use(scheduler: Scheduler, engine: Counters) -> None:
        group = scheduler.submit([request(0, 10**9) for _ in range(3)])
        await until(lambda: len(engine.running) == 2)
        await asyncio.to_thread(scheduler.close)
        with pytest.raises(Stopped, match="the server is stopping"):
            await texts(group)
        with pytest.raises(Stopped):
            scheduler.submit([request(1)])

    with_scheduler(use)
