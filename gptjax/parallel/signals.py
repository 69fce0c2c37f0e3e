"""When a run is asked to stop: by a signal to one process, at the same step for all."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@contextmanager
def until_signal() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C or SIGTERM, for the loop to stop at a whole step; obey the second."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        os.write(2, b"\nstopping after this step, to save; once more to quit at once\n")
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Whether to stop: asked of this process, or of any of several, which all stop together.

    Args:
        asked: whether this process was.
        mesh: the devices that carry the question round; all processes must call `soon` and `now`
            alike.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked = asked
        self._alone = jax.process_count() == 1
        self._rows = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._votes: list[jax.Array] = []

    def soon(self) -> bool:
        """As it was at the call before, so that nobody waits for the others."""
        if self._alone:
            return self._asked()
        self._votes.append(self._vote())
        return len(self._votes) > 1 and bool(self._votes.pop(0))

    def now(self) -> bool:
        """As it is now."""
        if self._alone:
            return self._asked()
        self._votes.clear()
        return bool(self._vote())

    def _vote(self) -> jax.Array:
        """Ask the devices whether any process was asked; they answer when they get to it."""
        here = np.full(jax.local_device_count(), self._asked())
        return self._any(jax.make_array_from_process_local_data(self._rows, here))
