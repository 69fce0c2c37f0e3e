"""The processes that feed a run's trackers: what they do, or fail to do, never stops the run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import gptjax
from gptjax.runs.folders import run_name
from gptjax.track import state
from gptjax.track.feed import LINGER
from gptjax.track.trackers import how_to_look

PATIENCE = 10.0  # seconds that the end of a run waits for its trackers


@contextmanager
def tracking(
    directory: Path, names: Sequence[str], say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """While this lasts, a process of its own feeds each tracker from the run's metrics.jsonl.

    Args:
        directory: of the run; its metrics hold no step that will be written again.
        names: of trackers; none: nothing is started.
        say: prints a line.

    Yields:
        A function that says, once, which trackers have stopped.
    """
    feeders = [_Feeder(directory, name, say) for name in names]

    def check() -> None:
        for feeder in feeders:
            feeder.check()

    try:
        yield check
    finally:
        for feeder in feeders:
            feeder.tell_the_end()
        until = time.monotonic() + PATIENCE
        for feeder in feeders:
            feeder.wait(until - time.monotonic())
        check()


class _Feeder:
    """A process that feeds a tracker."""

    def __init__(self, directory: Path, name: str, say: Callable[[str], None]):
        self._directory, self._name, self._say = directory, name, say
        self._log = directory / state.FOLDER / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        home = str(Path(gptjax.__file__).resolve().parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "gptjax.track.feed", str(directory.resolve()), name],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                    start_new_session=True,  # the terminal's Ctrl-C and hang-up are not for it
                )
        except OSError as error:
            self._stopped(str(error))
        else:
            say(f"tracking with {name}; to look: {how_to_look(name, directory)}")

    def check(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            self.tell_the_end()
            self._process = None
            if code:
                self._stopped(self._last_words() or f"exit code {code}")

    def tell_the_end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(max(0.0, seconds))
            except subprocess.TimeoutExpired:
                self._say(
                    f"{self._name} is still writing; it has {LINGER:.0f} s to end by itself, and "
                    f"{self._again()} writes what is missing then"
                )

    def _stopped(self, why: str) -> None:
        self._say(
            f"tracking with {self._name} has stopped ({why}); the training continues, and "
            f"{self._again()} writes what is missing"
        )

    def _again(self) -> str:
        return f"gptjax track {run_name(self._directory)} --to {self._name}"

    def _last_words(self) -> str:
        """The last line that it has printed."""
        with suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            words = [line.strip() for line in lines if line.strip()]
            return words[-1].removeprefix("gptjax track: error: ")[:300] if words else ""
        return ""
