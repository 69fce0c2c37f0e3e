"""Graceful stop: a signal to any process stops all of them at the same step."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@contextmanager
def until_signal() -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C, SIGTERM, SIGUSR1 (a scheduler's warning) or hang-up of the terminal,
    so that the loop can stop after a step; a second one acts at once. Under nohup, a hang-up stays
    ignored, and SIGUSR1 is left to a program that has its own use for it."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])
        # Through the stream: where stderr is closed, descriptor 2 may be another file.
        with suppress(Exception):
            line = b"\nfinishing this step and saving; press Ctrl-C again to quit now\n"
            os.write(sys.stderr.fileno(), line)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [signal.SIGINT, signal.SIGTERM]
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:
            numbers.append(hang_up)
        user = getattr(signal, "SIGUSR1", None)
        if user and signal.getsignal(user) is signal.SIG_DFL:
            numbers.append(user)
        before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Stop request shared by all processes.

    Args:
        asked: whether this process was asked to stop.
        mesh: devices that exchange the requests; all processes must call `soon` and `now` in the
            same order.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked = asked
        self._alone = jax.process_count() == 1
        self._rows = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._votes: list[jax.Array] = []

    def soon(self) -> bool:
        """Whether any process had been asked at the previous call; does not wait for the others."""
        if self._alone:
            return self._asked()
        self._votes.append(self._vote())
        return len(self._votes) > 1 and bool(self._votes.pop(0))

    def now(self) -> bool:
        """Whether any process has been asked by now; waits for the others."""
        if self._alone:
            return self._asked()
        self._votes.clear()
        return bool(self._vote())

    def _vote(self) -> jax.Array:
        """Start an asynchronous reduction over the devices: was any process asked?"""
        here = np.full(jax.local_device_count(), self._asked())
        return self._any(jax.make_array_from_process_local_data(self._rows, here))
