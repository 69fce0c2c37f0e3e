"""Feed a tracker from the files of a run; as a process, until the run that started it ends.

    python -m gptjax.track.feed DIRECTORY TRACKER

`metrics.jsonl` is the queue: a slow tracker reads it later, and one that died is fed again from it.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock

from gptjax.errors import UserError, one_line_errors
from gptjax.runs import records, samples
from gptjax.runs.folders import CONFIG, TOKENIZER
from gptjax.runs.records import Record
from gptjax.runs.run import read_config
from gptjax.track import state
from gptjax.track.points import Curve
from gptjax.track.trackers import Place, Tracker, open_tracker

POLL = 0.5  # seconds between looks at the file
WAIT = 300.0  # seconds for the process of an earlier session to end
LINGER = 120.0  # seconds after the run's end in which a tracker must have written everything
BATCH = 500  # records at a time


def feed(
    directory: Path,
    name: str,
    ended: Callable[[], bool],
    *,
    wait: float = 0.0,
    open_tracker: Callable[[str, Place], Tracker] = open_tracker,
) -> int:
    """Write a run's points into a tracker.

    Args:
        directory: of the run.
        name: of the tracker.
        ended: whether the run has ended, so that the file holds all there will be.
        wait: seconds for another process that feeds this tracker to end.
        open_tracker: as `trackers.open_tracker`.

    Returns:
        How many steps were written.

    Raises:
        UserError: another process does it, a run without metrics, or what the library raised.
    """
    config, path = read_config(directory), directory / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{directory} has no metrics yet; train it for some steps first")
    known = state.read(directory)
    curve = Curve(config.batch_size * config.model.block_size, known.peaks)
    count = 0
    with _locked(directory, name, wait):
        place = Place(
            directory,
            known.id,
            json.loads((directory / CONFIG).read_text(encoding="utf-8")),
            (directory / TOKENIZER).stat().st_mtime,
            _losses(path),
        )
        try:
            tracker = open_tracker(name, place)
            for some in follow(path, ended):
                texts = samples.read(directory) if any(map(_evaluated, some)) else {}
                tracker.write([curve.point(r, texts.get(r["step"])) for r in some])
                count += len(some)
            tracker.close()
        except UserError:
            raise
        except Exception as error:  # whatever a library raises
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise UserError(f"{name} failed: {type(error).__name__}: {reason}") from error
    return count


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[list[Record]]:
    """The records of a file that grows, some at a time; malformed lines are left out.

    Args:
        path: of metrics.jsonl.
        ended: whether it grows no more; asked before each look.
    """
    with path.open("rb") as file:
        over = False
        while not over:
            over = ended()
            found: list[Record] = []
            while (line := file.readline()).endswith(b"\n"):
                try:
                    found.append(records.as_record(json.loads(line)))
                except (ValueError, RecursionError):
                    continue
                if len(found) == BATCH:
                    yield found
                    found = []
            file.seek(-len(line), os.SEEK_CUR)  # the beginning of a line that is being written
            if found:
                yield found


def _evaluated(record: Record) -> bool:
    return any(name.startswith("val_") for name in record)


def _losses(path: Path) -> Callable[[int], float | None]:
    """The losses by step, read when they are first asked for."""
    found: dict[int, float] = {}

    def loss_at(step: int) -> float | None:
        if not found:
            found.update((r["step"], r["loss"]) for r in records.read(path)[0] if r.get("loss"))
        return found.get(step)

    return loss_at


def _locked(directory: Path, name: str, wait: float) -> AbstractContextManager[Any]:
    """Hold the lock of a run's tracker, so that each step is written once."""
    folder = directory / state.FOLDER
    try:
        folder.mkdir(exist_ok=True)
        return filelock.FileLock(folder / f"{name}.lock", timeout=wait).acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process feeds {name} from {directory}; wait for the training to end"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; fix its permissions") from None


def main(directory: Path, name: str) -> None:
    """Feed until standard input ends, which is when the training process does."""
    for number in ("SIGINT", "SIGTERM", "SIGHUP"):  # which the training process handles
        if hasattr(signal, number):
            signal.signal(getattr(signal, number), signal.SIG_IGN)
    over = threading.Event()

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock Python wants when it exits
            pass
        over.set()
        stuck = threading.Timer(LINGER, os._exit, (1,))
        stuck.daemon = True
        stuck.start()

    threading.Thread(target=watch, daemon=True).start()
    with one_line_errors("gptjax track"):
        feed(directory, name, lambda: over.wait(POLL), wait=WAIT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
