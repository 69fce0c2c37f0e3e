"""The runs that a server offers, and the few of them that are in memory."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.generation.chat import ChatTemplate, template_of
from gptjax.generation.engine import Engine
from gptjax.runs import folders
from gptjax.runs.files import numbered
from gptjax.runs.loaded import LoadedRun, load
from gptjax.serve.scheduler import Busy, Scheduler
from gptjax.serve.token_texts import TokenTexts


class UnknownModel(UserError):
    """No run, or no checkpoint, of that name."""


@dataclass(eq=False)
class Served:
    """A checkpoint of a run in memory, with the scheduler of its engine."""

    name: str
    """RUN@STEP."""
    run: LoadedRun
    scheduler: Scheduler
    texts: TokenTexts
    used: float = field(default_factory=time.monotonic)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """How the model writes a conversation; None: it is not one to chat with."""
        return template_of(self.run)


def _warm_engine(run: LoadedRun, slots: int) -> Engine:
    engine = run.engine(slots)
    engine.warm_up()
    return engine


class Models:
    """Opens runs by name; `get` is for one event loop.

    A name is RUN or RUN@CHECKPOINT, with CHECKPOINT one of best, last and a step. RUN is that of a
    folder in runs/, or of the one that the server was started with: a name from the network is
    looked up in that list and never becomes a path.

    Args:
        directory: of the run that is served where a request names none.
        checkpoint: of a run named without one.
        slots: requests that a run decodes together.
        queue: requests that may wait for a slot of a run.
        most: checkpoints in memory at once. One more takes the place of that which is idle and was
            not used for the longest time.
        open_run: opens a folder's checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: str = "best",
        *,
        slots: int = 8,
        queue: int = 64,
        most: int = 2,
        open_run: Callable[[Path, str], LoadedRun] = load,
    ):
        self.default = directory.resolve().name
        self._directory, self._checkpoint = directory, checkpoint
        self._slots, self._queue, self._most = slots, queue, most
        self._open_run = open_run
        self._lock = asyncio.Lock()  # one run is opened at a time
        self._asked: dict[str, Served] = {}  # by RUN@STEP, and by the names that they were given

    def runs(self) -> dict[str, Path]:
        """Folders of runs by name, the default first."""
        found = sorted(path.parent for path in folders.RUNS.glob("*/config.json"))
        return {self.default: self._directory} | {
            path.name: path for path in found if path.name != self.default
        }

    def catalogue(self) -> list[dict[str, Any]]:
        """Of each run its name, the steps of its checkpoints, and those that are in memory."""
        names = {served.name for served in self._in_memory()}
        return [
            {
                "name": name,
                "steps": (found := numbered(directory / "checkpoints")),
                "loaded": [step for step in found if f"{name}@{step}" in names],
            }
            for name, directory in self.runs().items()
        ]

    async def get(self, name: str | None = None) -> Served:
        """A run's checkpoint, opened if it is not in memory.

        Raises:
            UnknownModel: there is none of that name.
            UserError: it cannot be opened.
            Busy: as many as may be in memory are at work.
        """
        name = name or self.default
        if (served := self._asked.get(name)) is None:
            async with self._lock:
                served = await asyncio.to_thread(self.open, name)
        served.used = time.monotonic()
        return served

    def check(self, name: str) -> str:
        """A run's name, if there is such a run.

        Raises:
            UnknownModel: there is none.
        """
        self._split(name)
        return name

    def close(self) -> None:
        """Stop all engines."""
        for served in self._in_memory():
            served.scheduler.close()

    def _split(self, name: str) -> tuple[str, str]:
        """The run and the checkpoint of a name.

        Raises:
            UnknownModel: there is no such run.
        """
        runs = self.runs()
        if name in runs:
            return name, self._checkpoint
        run, _, checkpoint = name.rpartition("@")
        if run not in runs:
            raise UnknownModel(f"there is no model {name[:100]!r}; there are {', '.join(runs)}")
        return run, checkpoint

    def open(self, name: str) -> Served:
        """As `get`, where no event loop runs; by one thread at a time."""
        if (served := self._asked.get(name)) is not None:
            return served
        run_name, checkpoint = self._split(name)
        directory = self.runs()[run_name]
        steps = numbered(directory / "checkpoints")
        if checkpoint not in ("best", "last", *map(str, steps)):
            raise UnknownModel(
                f"{run_name} has no checkpoint {checkpoint[:100]!r}; there are best, last, "
                f"{', '.join(map(str, steps))}"
            )
        if checkpoint == "last" and steps:
            checkpoint = str(steps[-1])
        served = self._asked.get(f"{run_name}@{checkpoint}")
        if served is None:
            run = self._open_run(directory, checkpoint)
            served = self._asked.get(f"{run_name}@{run.step}") or self._start(run_name, run)
        if name != f"{run_name}@last":  # there may be a newer one next time
            self._asked[name] = served
        return served

    def _start(self, run_name: str, run: LoadedRun) -> Served:
        """Make room for a checkpoint, and start its engine."""
        self._make_room()
        scheduler = Scheduler(lambda: _warm_engine(run, self._slots), self._slots, self._queue)
        served = Served(f"{run_name}@{run.step}", run, scheduler, TokenTexts(run.tokenizer))
        self._asked[served.name] = served
        return served

    def _make_room(self) -> None:
        while len(served := self._in_memory()) >= self._most:
            idle = [s for s in served if s.scheduler.idle]
            if not idle:
                raise Busy(f"{len(served)} runs are in memory and at work; try again later")
            oldest = min(idle, key=lambda s: s.used)
            self._asked = {k: v for k, v in self._asked.items() if v is not oldest}
            oldest.scheduler.close()

    def _in_memory(self) -> set[Served]:
        return set(self._asked.values())
