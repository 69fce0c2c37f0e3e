"""What the devices do, second by second: a trace of a few calls, for XProf or TensorBoard."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import jax

SKIPPED, TRACED = 2, 4  # calls: the first compiles, the next may still wait for it


class Profile:
    """Traces calls of `train_steps` once the first are made.

    Args:
        folder: of the trace; None: nothing is traced.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._calls = 0

    def call(self, step: int) -> AbstractContextManager[None]:
        """To be held while the call that begins at `step` is made."""
        if self.folder is None:
            return nullcontext()
        self._calls += 1
        if self._calls == SKIPPED + 1:
            jax.profiler.start_trace(self.folder)
        elif self._calls == SKIPPED + TRACED + 1:
            jax.profiler.stop_trace()
        return jax.profiler.StepTraceAnnotation("train_steps", step_num=step)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End the trace if the run ends before it does."""
        yield
        if SKIPPED < self._calls <= SKIPPED + TRACED:
            jax.profiler.stop_trace()
            self._calls = SKIPPED + TRACED + 1
