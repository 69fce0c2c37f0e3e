"""A run's folder: the unit of exchange between training, sampling and you.

    runs/NAME/config.json     what was asked for
              tokenizer.json  how text becomes ids
              metrics.jsonl   one JSON object for each step, in order
              checkpoints/    see checkpoint.py
              bad/            states and batches of steps that were skipped, if any

No pickle, and nothing outside the folder.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from gptjax import config_json, files, records
from gptjax import tokenizer as tokenizer_module
from gptjax.config import Config, differences
from gptjax.errors import UserError
from gptjax.files import Damaged
from gptjax.records import Record
from gptjax.tokenizer import Tokenizer

RUNS = Path("runs")
LOCK = ".lock"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


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
        if not (directory / CONFIG).is_file() and not any(_copies(directory, CONFIG)):
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
    return max(found, key=_last_change)


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
        raise _taken(directory)
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
        raise _unwritable(directory, error) from None
    with lock:
        yield


def _taken(directory: Path) -> UserError:
    return UserError(
        f"{directory} holds another run already; go on with it (--run {run_name(directory)} "
        f"--resume) or give another name"
    )


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the run's folder {directory}: {error.strerror}; give another with "
        f"--run, or mend its permissions"
    )


def run_name(directory: Path) -> str:
    """What to type for `--run`."""
    return directory.name if directory.parent == RUNS else str(directory)


def read_config(directory: Path) -> Config:
    """The run's config.

    Raises:
        UserError: missing or damaged.
    """
    return _read(directory, CONFIG, config_json.from_json)


class Run:
    """An open run folder: `config`, `tokenizer`, and the metrics.

    Args:
        directory: that holds config.json and tokenizer.json.

    Attributes:
        changed: settings that differ from those of the newest checkpoint: {"steps": (old, new)}.

    Raises:
        UserError: a file that is missing or damaged, or something that leads out of the folder.
    """

    def __init__(self, directory: Path):
        files.refuse_links(directory)
        self.directory = directory
        self.config = read_config(directory)
        self.tokenizer: Tokenizer
        self._tokenizer_text, self.tokenizer = _read(
            directory, TOKENIZER, lambda text: (text, tokenizer_module.from_json(text))
        )
        self.changed = self._compare_with_copies()
        self._val_losses: dict[int, float] | None = None

    def _compare_with_copies(self) -> dict[str, tuple[Any, Any]]:
        """What of the config has changed since the newest checkpoint.

        Raises:
            UserError: something has that never may.
        """
        for place, text in _copies(self.directory, TOKENIZER):
            if text != self._tokenizer_text:
                raise Damaged(
                    f"{self.directory / TOKENIZER} is damaged: it is not the one that the "
                    f"checkpoints were made with; a sound copy is {place}"
                )
            break
        for place, text in _copies(self.directory, CONFIG):
            changed = differences(config_json.from_json(text), self.config)
            for name, (old, new) in changed.items():
                if _is_fixed(name) and name != "data.text":  # a text may have moved
                    raise Damaged(
                        f"{self.directory / CONFIG} is damaged: it says {name}={new}, and the "
                        f"checkpoints were made with {name}={old}; a sound copy is {place}"
                    )
            return changed
        return {}

    @property
    def texts(self) -> dict[str, str]:
        """The small files that each checkpoint keeps a copy of, by their names."""
        return {CONFIG: config_json.to_json(self.config), TOKENIZER: self._tokenizer_text}

    @classmethod
    def create(cls, directory: Path, config: Config, tokenizer: Tokenizer) -> "Run":
        """Make the folder of a new run.

        Raises:
            UserError: no permission, a disk that takes no more, or a run that is there already.
        """
        if (directory / CONFIG).exists():
            raise _taken(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from None
        files.write_atomically(directory / TOKENIZER, tokenizer.to_json())
        files.write_atomically(directory / CONFIG, config_json.to_json(config))
        return cls(directory)

    def change_config(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Go on with other settings.

        Returns:
            What changed: {"steps": (old, new)}.

        Raises:
            UserError: the model or the data would be others.
        """
        changed = differences(self.config, config)
        for name, (old, new) in changed.items():
            if _is_fixed(name):
                raise UserError(
                    f"cannot resume {self.directory} with {name}={new}: it was trained with "
                    f"{name}={old}; start a new run for that"
                )
        if changed:
            files.write_atomically(self.directory / CONFIG, config_json.to_json(config))
        self.config = config
        return changed

    @property
    def checkpoints_path(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def bad_path(self) -> Path:
        """States and batches of steps that were skipped."""
        return self.directory / "bad"

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, lines: list[Record]) -> None:
        """Append one line for each record; every record has its "step".

        Raises:
            UserError: the disk takes no more.
        """
        records.append(self.metrics_path, lines)
        if self._val_losses is not None:
            self._val_losses |= self._losses_of(lines)

    def metrics(self) -> list[Record]:
        """The records, in order; lines that are none are left out."""
        return records.read(self.metrics_path)[0]

    def rewind_metrics(self, step: int) -> tuple[list[Record], str | None]:
        """Drop the records after `step`, which a resumed run will write again.

        Returns:
            The rest, and what is wrong with the file, if anything.

        Raises:
            UserError: the disk takes no more.
        """
        self._val_losses = None
        return records.rewind(self.metrics_path, step)

    def _losses_of(self, lines: list[Record]) -> dict[int, float]:
        """By step: the loss that tells which checkpoint is the best, or NaN."""
        key = "val_loss" if self.config.eval_batches is None else "val_sampled_loss"
        losses = {record["step"]: record.get(key) for record in lines}
        return {step: math.nan if loss is None else loss for step, loss in losses.items()}

    def best_step(self, steps: list[int]) -> int | None:
        """Which of `steps` has the lowest validation loss; None if none was evaluated."""
        if self._val_losses is None:
            self._val_losses = self._losses_of(self.metrics())
        found = [(self._val_losses.get(step, math.nan), step) for step in steps]
        losses = [(loss, step) for loss, step in found if math.isfinite(loss)]
        return min(losses)[1] if losses else None

    def keep(self, steps: list[int]) -> set[int]:
        """The checkpoints worth keeping: the newest `keep_last`, the best, and those whose metrics
        were lost, for one of them may have been the best."""
        best = self.best_step(steps)
        lost = {step for step in steps if step not in (self._val_losses or {})}
        newest = {*steps[-self.config.keep_last :]}
        return newest | lost | ({best} if best is not None else set())

    def choose(self, which: str, steps: list[int]) -> int:
        """The checkpoint that "best", "last" or a number names.

        Raises:
            UserError: no checkpoint yet, or not that one.
        """
        if not steps:
            raise UserError(
                f"{self.directory} has no checkpoint yet; the first is saved after step "
                f"{min(self.config.save_every, self.config.steps)}"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.best_step(steps)
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(
            f"{self.directory} has no checkpoint {which!r}; give best, last, or one of "
            f"{', '.join(map(str, steps))}"
        )


def _read(directory: Path, name: str, parse: Callable[[str], Any]) -> Any:
    """A small file of the run; if it is damaged, the error names a sound copy."""
    try:
        return files.read_file(directory / name, parse)
    except UserError as error:
        for place, _ in _copies(directory, name):
            raise type(error)(f"{error}; a sound copy is {place}") from None
        raise


def _copies(directory: Path, name: str) -> Iterator[tuple[Path, str]]:
    return files.sealed_copies(directory / "checkpoints", name)


def _is_fixed(setting: str) -> bool:
    """Whether a run must keep this setting to its end."""
    return setting.startswith(("model.", "data.")) and setting not in ("model.dtype", "model.remat")


def _is_vacant(directory: Path) -> bool:
    """Whether there is nothing in it but what a process leaves that died before it made a run."""
    leftovers = {LOCK, TOKENIZER, f"{TOKENIZER}.tmp", f"{CONFIG}.tmp"}
    return directory.is_dir() and {path.name for path in directory.iterdir()} <= leftovers


def _last_change(directory: Path) -> int:
    changing = (directory / CONFIG, directory / "metrics.jsonl")
    return max(path.stat().st_mtime_ns for path in changing if path.exists())


def _check_name(name: str) -> None:
    if not name or "\0" in name or any(len(os.fsencode(p)) > 255 for p in Path(name).parts):
        raise UserError(f"--run {name[:40]!r} cannot name a folder; give 1 to 255 characters")


def _base_name(preset: str) -> str:
    return preset.replace("/", "-")


def _names() -> list[str]:
    return sorted(p.parent.name for p in RUNS.glob("*/config.json"))
