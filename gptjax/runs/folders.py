"""Where runs lie: their folders by name, and one process at a time on each."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from gptjax.errors import UserError
from gptjax.runs import files

RUNS = Path("runs")
LOCK = ".lock"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
METRICS, TEXT = "metrics.json", "text.json"  # in checkpoints: fingerprints of what they came from


def find(name: str | None, like: str | None = None) -> Path:
    """The folder of a run that exists.

    Args:
        name: a name in runs/, or a path; None: the newest run.
        like: with no name, only runs named after this preset.

    Raises:
        UserError: no such run.
    """
    if name is not None:
        _check_name(name)
        directory = next((p for p in (RUNS / name, Path(name)) if p.exists()), RUNS / name)
        if not (directory / CONFIG).is_file() and not any(copies(directory, CONFIG)):
            raise UserError(
                f"{directory} is not a run's folder (it has no config.json); runs here: "
                f"{', '.join(_names()) or 'none'}"
            )
        return directory
    pattern = rf"{re.escape(_base_name(like))}(-\d+)?" if like else r".*"
    found = [RUNS / n for n in _names() if re.fullmatch(pattern, n)]
    if not found:
        kind = f"run of preset {like}" if like else "run"
        raise UserError(f"there is no {kind} in {RUNS}/; make one with python train.py")
    changing = lambda run: [p for p in (run / CONFIG, run / "metrics.jsonl") if p.exists()]
    return max(found, key=lambda run: max(p.stat().st_mtime_ns for p in changing(run)))


def new_directory(name: str | None, preset: str) -> Path:
    """A folder for a new run, not yet made: `name`, or the preset's with the first free number.

    Raises:
        UserError: the folder holds something already.
    """
    if name is None:
        base = _base_name(preset)
        directory, number = RUNS / base, 2
        while directory.exists():
            directory, number = RUNS / f"{base}-{number}", number + 1
        return directory
    _check_name(name)
    directory = Path(name) if os.sep in name else RUNS / name
    if directory.exists() and not _is_vacant(directory):
        raise taken(directory)
    return directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no other process train this run meanwhile; a process that dies leaves no lock behind.

    Raises:
        UserError: another process is training it, or the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process is training {directory}; wait until it ends, or stop it"
        ) from None
    except OSError as error:
        raise unwritable(directory, error) from None
    with lock:
        yield


def taken(directory: Path) -> UserError:
    return UserError(
        f"{directory} holds another run already; go on with it (--run {run_name(directory)} "
        f"--resume) or give another name"
    )


def unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the run's folder {directory}: {error.strerror}; give another with "
        f"--run, or mend its permissions"
    )


def run_name(directory: Path) -> str:
    """What to type for `--run`."""
    return directory.name if directory.parent == RUNS else str(directory)


def copies(directory: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Sound copies of a small file of a run, in its checkpoints, with their text; newest first."""
    return files.sealed_copies(directory / "checkpoints", name)


def _is_vacant(directory: Path) -> bool:
    """Whether there is nothing in it but what a process leaves that died before it made a run."""
    leftovers = {LOCK, TOKENIZER, f"{TOKENIZER}.tmp", f"{CONFIG}.tmp"}
    return directory.is_dir() and {path.name for path in directory.iterdir()} <= leftovers


def _check_name(name: str) -> None:
    if not name or "\0" in name or any(len(os.fsencode(p)) > 255 for p in Path(name).parts):
        raise UserError(f"--run {name[:40]!r} cannot name a folder; give 1 to 255 characters")


def _base_name(preset: str) -> str:
    return preset.replace("/", "-")


def _names() -> list[str]:
    return sorted(p.parent.name for p in RUNS.glob("*/config.json"))
