"""Requests of many clients, decoded together by the one thread that owns an engine."""

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

from gptjax.generation.engine import Engine
from gptjax.generation.requests import Piece, Request
from gptjax.parallel.switches import pinned

SECONDS = 0.1  # of a step, or those of one token if it takes longer; then others join and leave


class Busy(Exception):
    """There is no room for more requests; try again later."""


class Stopped(Exception):
    """The engine has stopped: the server ends, or a run made room for another."""


class Scheduler:
    """Owns an engine, in a thread: adds requests as slots become free, and takes steps.

    Args:
        make_engine: called in the thread; again after the engine has failed.
        slots: of that engine.
        queue: requests that may wait for a slot.

    Raises:
        Exception: what `make_engine` raises.
    """

    def __init__(self, make_engine: Callable[[], Engine], slots: int, queue: int = 64):
        self.room = slots + queue
        self._make_engine = make_engine
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Stream] = deque()
        self._running: dict[int, _Stream] = {}
        self._closed = False
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.result()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not (self._waiting or self._running)

    def submit(self, requests: Sequence[Request]) -> "Group":
        """Queue requests, all or none; called in an event loop.

        Raises:
            Busy: more would wait than may.
            Stopped: the scheduler is closed.
        """
        group = Group(self, requests)
        with self._changed:
            if self._closed:
                raise Stopped("the engine has stopped; try again")
            taken = len(self._waiting) + len(self._running)
            if taken + len(requests) > self.room:
                raise Busy(f"{taken} requests are running or waiting; try again later")
            self._waiting.extend(group.streams)
            self._changed.notify()
        return group

    def cancel(self, streams: "Sequence[_Stream]") -> None:
        """Drop requests: from the queue at once, from the engine before its next step."""
        with self._changed:
            for stream in streams:
                stream.cancelled = True
                with suppress(ValueError):
                    self._waiting.remove(stream)

    def close(self) -> None:
        """Stop after the present step; who still waits gets `Stopped`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self, ready: "Future[None]") -> None:
        """The thread: all that touches the engine."""
        with pinned():
            self._work(ready)

    def _work(self, ready: "Future[None]") -> None:
        engine: Engine | None = None
        try:
            engine = self._make_engine()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while self._wait():
            try:
                engine = engine or self._make_engine()
                self._step(engine)
            except Exception as error:  # a fault of gptjax, or of the device
                traceback.print_exc()
                self._fail(error, waiting=engine is None)
                engine = None
        self._fail(Stopped("the server is stopping"), waiting=True)

    def _step(self, engine: Engine) -> None:
        self._admit(engine)
        for id_, piece in engine.step(SECONDS).items():
            stream = self._running[id_]
            if piece.finish is not None:
                with self._changed:
                    del self._running[id_]
            stream.put(piece)

    def _wait(self) -> bool:
        """Wait for something to do; False: for nothing, for the scheduler is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _admit(self, engine: Engine) -> None:
        """Free the slots of who left, and fill what is free from the queue, first come first."""
        for id_ in [id_ for id_, stream in self._running.items() if stream.cancelled]:
            with self._changed:
                del self._running[id_]
            engine.cancel(id_)
        while engine.free:
            with self._changed:
                if not self._waiting:
                    return
                stream = self._waiting.popleft()
            try:
                id_ = engine.add(stream.request)
            except Exception as error:
                stream.put(error)
                if isinstance(error, ValueError):  # a request that is refused harms no other
                    continue
                raise
            with self._changed:
                self._running[id_] = stream

    def _fail(self, error: Exception, waiting: bool) -> None:
        """End the running requests, and the waiting ones too if asked, with an error."""
        with self._changed:
            streams = [*self._running.values(), *(self._waiting if waiting else ())]
            self._running.clear()
            if waiting:
                self._waiting.clear()
        for stream in streams:
            stream.put(error)


class _Stream:
    """One request, and where its pieces go."""

    def __init__(self, request: Request, put: Callable[[Piece | Exception], None]):
        self.request, self.put, self.cancelled = request, put, False


class Group:
    """Requests of one client: `async for index, piece in group`, until each has finished.

    Raises (while iterating):
        Exception: what ended one of them before its time.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]):
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.streams = [_Stream(r, self._put_for(i)) for i, r in enumerate(requests)]

    def _put_for(self, index: int) -> Callable[[Piece | Exception], None]:
        def put(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is there to read it
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return put

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        running = len(self.streams)
        while running:
            index, piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece.finish is not None
            yield index, piece

    def cancel(self) -> None:
        """Drop what has not finished; harmless if all has."""
        self._scheduler.cancel(self.streams)
