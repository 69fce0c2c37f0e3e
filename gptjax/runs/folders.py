"""Find, name and lock run folders."""

import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from gptjax.errors import UserError
from gptjax.runs import files

RUNS = Path("runs")
LONGEST = 2000  # bytes of a path, of which the files in the folder need some more
LOCK = ".lock"
CONFIG, TOKENIZER, CHAT = "config.json", "tokenizer.json", "chat.json"
METRICS, TEXT = "metrics.json", "text.json"  # in checkpoints: digests of the metrics and the text


def find(name: str | None, like: str | None = None) -> Path:
    """Find the folder of an existing run.

    Args:
        name: a name in runs/, or a path; None: the most recently trained run.
        like: if `name` is None, consider only runs named after this preset.

    Raises:
        UserError: no such run.
    """
    if name is not None:
        directory = _place(name)
        if not is_run(name):
            raise UserError(
                f"{directory} is not a run's folder (it has no config.json); available runs: "
                f"{', '.join(_names()) or 'none'}"
            )
        return directory
    pattern = rf"{re.escape(_base_name(like))}(-\d+)?" if like else r".*"
    found = [RUNS / n for n in _names() if re.fullmatch(pattern, n)]
    if not found:
        kind = f"run of preset {like}" if like else "run"
        raise UserError(f"there is no {kind} in {RUNS}/; train one with python train.py")
    changing = lambda run: [p for p in (run / CONFIG, run / "metrics.jsonl") if p.exists()]
    return max(found, key=lambda run: max(p.stat().st_mtime_ns for p in changing(run)))


def is_run(name: str) -> bool:
    """Whether a run has that name or path."""
    try:
        directory = _place(name)
    except UserError:
        return False
    return (directory / CONFIG).is_file() or any(copies(directory, CONFIG))


def _place(name: str) -> Path:
    _check_name(name)
    places = (Path(name), RUNS / name) if os.sep in name else (RUNS / name, Path(name))
    return next((place for place in places if place.exists()), RUNS / name)


def new_directory(name: str | None, preset: str) -> Path:
    """Choose the folder of a new run: `name`, or the preset's name with the first free number.

    The folder is not created.

    Raises:
        UserError: the folder is not empty.
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
    """Hold the run's lock, so that only one process trains it; it is released if a process dies.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    busy = UserError(f"another process is training {directory}; wait for it to finish, or stop it")
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(directory / LOCK, timeout=0))
            # The lock's file may be deleted; the folder itself is locked too, where that can be.
            if os.name != "nt":
                descriptor = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                # Who asks `is_locked` has it for a moment.
                if not any(files.locks(descriptor) or time.sleep(0.05) for _ in range(20)):
                    raise busy
        except filelock.Timeout:
            raise busy from None
        except OSError as error:
            raise unwritable(directory, error) from None
        yield


def is_locked(directory: Path) -> bool:
    """Whether a process is training the run; False where there are no locks."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            return not files.locks(descriptor, shared=True)
        finally:
            os.close(descriptor)
    return False


def taken(directory: Path) -> UserError:
    """The error for a new run in a folder that is not empty."""
    return UserError(
        f"{directory} already contains a run; resume it ({run_flag(directory)} --resume) or "
        f"choose another name"
    )


def unwritable(directory: Path, error: OSError) -> UserError:
    """The error for a run folder that cannot be created or written."""
    return UserError(
        f"cannot write the run's folder {directory}: {error.strerror}; choose another with --run, "
        f"or fix its permissions"
    )


def run_name(directory: Path) -> str:
    """The value of `--run` for this folder: its name in runs/, or its path."""
    if directory.parent == RUNS:
        return directory.name
    return os.path.join(os.curdir, directory) if os.sep not in str(directory) else str(directory)


def run_flag(directory: Path) -> str:
    """`--run NAME` of this folder, as it is typed in a shell."""
    name = shlex.quote(run_name(directory))
    return f"--run={name}" if name.startswith("-") else f"--run {name}"


def copies(directory: Path, name: str) -> Iterator[tuple[Path, str]]:
    """The intact copies of a small file in the run's checkpoints, as (path, text); newest first."""
    return files.sealed_copies(directory / "checkpoints", name)


def _is_vacant(directory: Path) -> bool:
    """Whether a folder contains nothing but leftovers of a process killed while creating a run."""
    leftovers = {LOCK, TOKENIZER, CHAT} | {f"{n}.tmp" for n in (CONFIG, TOKENIZER, CHAT)}
    return directory.is_dir() and {path.name for path in directory.iterdir()} <= leftovers


def _check_name(name: str) -> None:
    longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
    if not name or "\0" in name or longest > 255 or len(os.fsencode(name)) > LONGEST:
        raise UserError(f"--run {name[:40]!r} is not a folder name; give 1 to 255 characters")


def _base_name(preset: str) -> str:
    return preset.replace("/", "-")


def _names() -> list[str]:
    return sorted(p.parent.name for p in RUNS.glob("*/config.json"))
